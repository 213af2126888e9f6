"""A real engine whose blocks are stored in 8 bits: near the exact answers, never a wrong byte."""

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from kvkeep.model.errors import InputError
from kvkeep.stack.precedence import load_spec
from kvkeep.stack.supervisor import Stack
from kvkeep.transfer.int8_form import Int8Form
from kvkeep.validate.answer import Answer
from kvkeep.validate.capability import probe
from kvkeep.validate.counters import Counters
from kvkeep.validate.load import Endpoint, Sampling
from kvkeep.validate.prompts import documents
from kvkeep.validate.runner import Watch
from kvkeep.validate.subject import Addresses, open_subject
from tests.e2e.test_exact import Pool

NUM_PROMPTS = 10
NUM_WORDS = 100
BLOCK_TOKENS = 32
PAGE_VALUES = BLOCK_TOKENS * 2 * 64
"""K and V of a block's tokens in one head of the model."""
SAMPLING = Sampling(max_tokens=8)
SERVED_SHARE = 0.98
SAME_FIRST_TOKENS = 8
"""Of ten prompts; the others may be near ties."""
MEAN_DIFFERENCE_NATS = 0.1
MAX_DIFFERENCE_NATS = 1.0

# Computed blocks and loaded ones are equal to the bit but for the form.
STACK = """\
model: smollm2
exact: true
daemon: {pool_bytes: 256MiB}
engines:
  - name: a
    kv_cache_bytes: 512MiB
    max_model_len: 2048
    connector_settings: {kv_form: int8, patience_ms: 5000}
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One engine and a daemon."""
    folder = tmp_path_factory.mktemp("form")
    file = folder / "stack.yaml"
    file.write_text(STACK)
    with Stack(load_spec(file), state_dir=folder / "state") as running:
        yield running


class Asked:
    """Answers computed and answers after a reset, and what the daemon counted in between."""

    computed: list[Answer]
    loaded: list[Answer]
    counted: Counters
    status: dict[str, Any]


async def _ask_twice(stack: Stack, num_prompts: int, seed: int, *, flip: bool = False) -> Asked:
    """Ask for each document, empty the engine's own cache, and ask again.

    Args:
        stack: The engine and the daemon.
        num_prompts: How many documents.
        seed: Of the documents.
        flip: In between, flip a bit of the first magnitude in every stored block.
    """
    prompts = [doc.prompt() for doc in documents(num_prompts, NUM_WORDS, seed=seed)]
    asked = Asked()
    async with (
        Endpoint(stack.engines["a"].url, model=stack.model_name, timeout_s=120.0) as engine,
        Endpoint(stack.daemon.metrics_url, name="daemon") as daemon,
    ):
        await probe(engine)
        watch = Watch(engine, daemon)
        # Under a salt of its own: nothing of an earlier test is served, in whatever form.
        salt = f"documents {seed}"
        asked.computed = [await engine.chat(p.text, SAMPLING, salt=salt) for p in prompts]
        await watch.read_settled()
        assert (await engine.reset_prefix_cache()).ok
        if flip:
            _flip_magnitudes(stack.daemon.pool)
        before = await watch.read_settled()
        asked.loaded = [await engine.chat(p.text, SAMPLING, salt=salt) for p in prompts]
        asked.counted = (await watch.read_settled()).since(before)
        asked.status = await daemon.get_json("/status")
    return asked


def _flip_magnitudes(path: str) -> None:
    """Make the first 64 values of every block twice or half as large."""
    pool = Pool(path)
    try:
        for slot in pool.used_slots():
            pool.flip(pool.payload(slot).start + PAGE_VALUES, 7)
    finally:
        pool.close()


def _served_share(answers: list[Answer]) -> float:
    whole = sum(((answer.prompt_tokens or 0) - 1) // BLOCK_TOKENS for answer in answers)
    served = sum(answer.cached_tokens or 0 for answer in answers)
    return served / (whole * BLOCK_TOKENS)


def differences_nats(computed: Answer, loaded: Answer) -> list[float]:
    """How far each token's logprob moved that both chose, up to the first that differs."""
    both = itertools.takewhile(
        lambda pair: pair[0].token == pair[1].token,
        zip(computed.steps, loaded.steps, strict=False),
    )
    return [abs(one.logprob - other.logprob) for one, other in both]


@pytest.mark.timeout(300, func_only=True)
def test_blocks_in_eight_bits_answer_nearly_as_exact_ones(stack: Stack) -> None:
    """After a reset all comes from the pool, in half the bytes, and the answers are near."""
    asked = asyncio.run(_ask_twice(stack, NUM_PROMPTS, seed=3))

    layout, counters = asked.status["pool"]["layout"], asked.counted.daemon
    assert layout["page_format"].endswith(f" {Int8Form.name}")
    assert layout["page_bytes"] == PAGE_VALUES + PAGE_VALUES // 64 * 2
    assert counters["blocks_loaded"] > 0
    assert counters["load_failures"] == 0
    assert _served_share(asked.loaded) >= SERVED_SHARE
    pairs = list(zip(asked.computed, asked.loaded, strict=True))
    assert [loaded.error for _, loaded in pairs] == [None] * NUM_PROMPTS
    same = [one.steps[0].token == other.steps[0].token for one, other in pairs]
    assert sum(same) >= SAME_FIRST_TOKENS
    moved = [nats for one, other in pairs for nats in differences_nats(one, other)]
    assert 0 < sum(moved) / len(moved) <= MEAN_DIFFERENCE_NATS
    assert max(moved) <= MAX_DIFFERENCE_NATS


async def _open_exact(stack: Stack) -> None:
    addresses = Addresses(stack.engines["a"].url, stack.daemon.metrics_url)
    async with open_subject(addresses, timeout_s=60, exact=True):
        pytest.fail("opened")


def test_the_exact_mode_refuses_blocks_in_eight_bits(stack: Stack) -> None:
    """What this daemon says of its pool is enough to know that no bits will be equal."""
    with pytest.raises(InputError, match="form int8"):
        asyncio.run(_open_exact(stack))


@pytest.mark.timeout(300, func_only=True)
def test_a_changed_magnitude_is_a_miss(stack: Stack) -> None:
    """One bit that would double 64 values of each block is found; the answers are computed ones."""
    asked = asyncio.run(_ask_twice(stack, 3, seed=4, flip=True))

    assert [one.error for one in asked.loaded] == [None] * 3
    assert asked.counted.daemon["load_failures"] >= 3
    assert [one.steps for one in asked.loaded] == [one.steps for one in asked.computed]
