"""In the exact mode every way to come by KV gives the same bits, also when stored bytes go bad."""

import asyncio
import mmap
import os
import secrets
from collections.abc import Callable

import numpy as np
import pytest

from kvkeep.stack.supervisor import Stack
from kvkeep.tiers.pool_inode import FILE_HEADER_BYTES
from kvkeep.tiers.shared_memory import PoolView
from kvkeep.validate.arms import ArmsReport, Means, compare_arms, standard_arms
from kvkeep.validate.capability import probe
from kvkeep.validate.load import Endpoint, Sampling
from kvkeep.validate.prompts import documents
from kvkeep.validate.runner import Watch
from kvkeep.validate.verdict import Verdict

BLOCK_TOKENS = 32
NUM_PROMPTS = 20
SAMPLING = Sampling(max_tokens=8)
ENGINE_TIMEOUT_S = 120.0


async def _compare(stack: Stack, names: list[str]) -> ArmsReport:
    prompts = [doc.prompt() for doc in documents(NUM_PROMPTS, 150, seed=7)]
    urls = {name: part.url for name, part in stack.engines.items()}
    async with (
        Endpoint(urls["a"], model=stack.model_name, timeout_s=ENGINE_TIMEOUT_S) as a,
        Endpoint(urls["b"], model=stack.model_name, timeout_s=ENGINE_TIMEOUT_S) as b,
        Endpoint(stack.daemon.metrics_url, name="daemon") as daemon,
    ):
        await probe(a)
        await probe(b)

        async def restart() -> None:
            await asyncio.to_thread(stack.engines["a"].restart)

        means = Means(a, daemon, b, restart=restart)
        arms = standard_arms(names, means, run_id=secrets.token_hex(4))
        return await compare_arms(arms, prompts, SAMPLING, block_tokens=BLOCK_TOKENS, exact=True)


@pytest.mark.timeout(900, func_only=True)
def test_every_way_to_a_prefix_gives_the_same_bits(exact_stack: Stack) -> None:
    """Cold, cached, reset, other engine, engine restarted: equal token ids and logprobs."""
    names = ["cold", "cached", "reset", "other-engine", "restart"]

    report = asyncio.run(_compare(exact_stack, names))

    verdicts = {arm.name: [j.judgement.verdict for j in arm.judged] for arm in report.arms}
    assert {**dict.fromkeys(verdicts, [Verdict.IDENTICAL] * NUM_PROMPTS), "cold": []} == verdicts
    assert [arm.check.detail for arm in report.arms if not arm.check.ok] == []
    assert report.passed


class Pool:
    """The stack's pool, to be damaged."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR)
        pool_id = os.pread(self._fd, 16, 16)
        self.geometry = PoolView.open(path, pool_id).geometry
        self._map = mmap.mmap(self._fd, 0)

    def header(self, slot: int) -> slice:
        """Header and digests of a slot."""
        start = FILE_HEADER_BYTES + slot * self.geometry.header_stride
        return slice(start, start + self.geometry.header_stride)

    def payload(self, slot: int) -> slice:
        """Bytes of a slot."""
        size = self.geometry.layout.block_bytes
        start = self.geometry.payload_offset + slot * size
        return slice(start, start + size)

    def used_slots(self) -> list[int]:
        """Slots with a payload that is not all zeros, by index."""
        size = self.geometry.num_slots
        return [slot for slot in range(size) if any(self._map[self.payload(slot)][:4096])]

    def flip(self, offset: int, bit: int) -> None:
        """Flip one bit."""
        self._map[offset] ^= 1 << bit

    def cut(self, slot: int) -> None:
        """Lose the last third of a payload."""
        where = self.payload(slot)
        third = self.geometry.layout.block_bytes // 3
        self._map[where.stop - third : where.stop] = bytes(third)

    def swap(self, one: slice, other: slice) -> None:
        """Exchange two runs of bytes."""
        self._map[one], self._map[other] = self._map[other], self._map[one]

    def close(self) -> None:
        """Let go."""
        self._map.close()
        os.close(self._fd)


def _flip_payload(pool: Pool, slots: list[int], rng: np.random.Generator) -> None:
    for slot in slots:
        where = pool.payload(slot)
        pool.flip(int(rng.integers(where.start, where.stop)), int(rng.integers(8)))


def _flip_header(pool: Pool, slots: list[int], rng: np.random.Generator) -> None:
    for slot in slots:
        where = pool.header(slot)
        end = where.start + 128 + 16 * pool.geometry.layout.num_pages
        pool.flip(int(rng.integers(where.start, end)), int(rng.integers(8)))


def _cut_payload(pool: Pool, slots: list[int], rng: np.random.Generator) -> None:
    for slot in slots:
        pool.cut(slot)


def _swap_payloads(pool: Pool, slots: list[int], rng: np.random.Generator) -> None:
    for one, other in zip(slots[::2], slots[1::2], strict=False):
        pool.swap(pool.payload(one), pool.payload(other))


def _swap_everything(pool: Pool, slots: list[int], rng: np.random.Generator) -> None:
    _swap_payloads(pool, slots, rng)
    for one, other in zip(slots[::2], slots[1::2], strict=False):
        pool.swap(pool.header(one), pool.header(other))


Damage = Callable[[Pool, list[int], np.random.Generator], None]


@pytest.mark.parametrize(
    "damage",
    [_flip_payload, _flip_header, _cut_payload, _swap_payloads, _swap_everything],
    ids=["flip-payload", "flip-header", "cut", "swap-payloads", "swap-slots"],
)
def test_damaged_blocks_are_computed_again(exact_stack: Stack, damage: Damage) -> None:
    """After every stored block was damaged the answers are still equal to the bit."""
    asyncio.run(_damage_and_compare(exact_stack, damage))


async def _damage_and_compare(stack: Stack, damage: Damage) -> None:
    prompts = [doc.prompt() for doc in documents(3, 150, seed=11)]
    salt = secrets.token_hex(4)
    rng = np.random.default_rng(5)
    async with (
        Endpoint(stack.engines["a"].url, model=stack.model_name, timeout_s=ENGINE_TIMEOUT_S) as a,
        Endpoint(stack.daemon.metrics_url, name="daemon") as daemon,
    ):
        await probe(a)
        watch = Watch(a, daemon)
        computed = [await a.chat(prompt.text, SAMPLING, salt=salt) for prompt in prompts]
        await watch.read_settled()
        assert (await a.reset_prefix_cache()).ok
        pool = Pool(stack.daemon.pool)
        try:
            damage(pool, pool.used_slots(), rng)
        finally:
            pool.close()
        before = await watch.read_settled()

        damaged = [await a.chat(prompt.text, SAMPLING, salt=salt) for prompt in prompts]

        failures = (await watch.read_settled()).since(before).daemon["load_failures"]
        assert [answer.error for answer in damaged] == [None] * len(prompts)
        assert [answer.steps for answer in computed] == [answer.steps for answer in damaged]
        assert failures > 0
