"""Clearing while a copy is on its way; the commands against real daemons are in integration."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import xxhash

from kvkeep.core import effects as do
from kvkeep.core import events as on
from kvkeep.core.admission import AdmissionPolicy, AdmissionSettings
from kvkeep.daemon.movement import inspection
from kvkeep.daemon.movement.cascade import Cascade
from kvkeep.daemon.movement.inspection import Inspection
from kvkeep.daemon.movement.lower_tier import LowerTier
from kvkeep.daemon.movement.movement import Movement
from kvkeep.daemon.movement.slots import value_bytes
from kvkeep.daemon.settings import DaemonSettings
from kvkeep.daemon.shell import Shell
from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.model.ids import BlockHash, BlockKey, Holder, Namespace
from kvkeep.model.layout import KvLayout
from kvkeep.tiers.base import Parts
from kvkeep.tiers.io_queue import TierQueue
from kvkeep.tiers.memory import MemoryTier
from kvkeep.tiers.shared_memory import PoolFile

LAYOUT = KvLayout(2, 2, 512, 16, "bfloat16", "test")
NAMESPACE = Namespace(b"n" * 32)
ENGINE = Holder(1, 1)
WAIT_S = 60.0


class GatedTier(MemoryTier):
    """Writes wait until they are let through."""

    def __init__(self) -> None:
        super().__init__(1 << 24)
        self.reached = threading.Event()
        self.proceed = threading.Event()

    def write(self, keys: Sequence[BlockKey], values: Sequence[Parts]) -> list[bool]:
        """As the memory tier, but later."""
        self.reached.set()
        assert self.proceed.wait(WAIT_S)
        return super().write(keys, values)


class Stage:
    """A pool, one gated tier below it, and a cascade between them."""

    def __init__(self, folder: Path) -> None:
        clock = SystemClock()
        self.shell = Shell(PoolFile.open(folder / "pool", 3 << 20), clock)
        self.shell.open_layout(LAYOUT)
        self.view = self.shell.pool.view()
        self.medium = GatedTier()
        self.queue = TierQueue(self.medium)
        self.tier = LowerTier(
            self.queue,
            AdmissionPolicy(AdmissionSettings(capacity_bytes=1 << 24)),
            clock,
            value_bytes=value_bytes(self.view),
            is_local=True,
            probes_at_once=1,
        )
        self.movement = Movement(DaemonSettings(), self.shell, clock, lambda _name, _number: None)
        self.movement._set.tiers.append(self.tier)
        self.movement._cascade = Cascade(
            self.shell, [self.tier], self.view, lambda _name, _number: None
        )
        self.inspection = Inspection(self.shell, self.movement)

    def store(self, *numbers: int) -> list[BlockKey]:
        """An engine stores blocks, and they begin to go down."""
        hashes = [BlockHash(bytes([number]) * 32) for number in numbers]
        reply = self.shell.handle(on.StoreAsked(0, ENGINE, NAMESPACE, 0, hashes, 3, float("inf")))
        assert isinstance(reply, do.ReplyStore)
        for slot in reply.slots:
            for layer in range(LAYOUT.num_layers):
                for head in range(LAYOUT.num_heads):
                    start = (layer * LAYOUT.num_heads + head) * LAYOUT.page_bytes
                    page = self.view.payload(slot)[start : start + LAYOUT.page_bytes]
                    digest = xxhash.xxh3_128_digest(page.tobytes())
                    self.view.digests[slot, layer, head] = list(digest)
        self.shell.handle(on.StoreFinished(0, ENGINE, reply.lease_id, [True] * len(hashes)))
        keys = list(self.shell.ready_keys)
        assert len(keys) == len(numbers)
        self.movement.stored(keys)
        return keys


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    """Closed afterwards."""
    made = Stage(tmp_path)
    yield made
    made.medium.proceed.set()
    await made.movement.close()
    del made.view, made.movement, made.inspection
    made.shell.close()


async def cleared(stage: Stage, *names: str) -> list[dict[str, object]]:
    """All parts of the answer."""
    return [part async for part in stage.inspection.clear(names)]


async def test_a_copy_on_its_way_does_not_bring_a_block_back(stage: Stage) -> None:
    """Clearing waits for the copy that has begun, and lets none begin before it has ended."""
    stage.store(1, 2, 3)
    await asyncio.to_thread(stage.medium.reached.wait, WAIT_S)
    task = asyncio.create_task(cleared(stage, "memory", "pool"))
    await asyncio.sleep(0)
    late = stage.store(4)

    assert not stage.tier.admits(late[0])
    assert not task.done()
    stage.medium.proceed.set()
    parts = await asyncio.wait_for(task, WAIT_S)
    assert [part["tier"] for part in parts] == ["memory", "pool"]
    assert parts[0]["num_cleared"] == 3
    assert list(stage.medium.keys()) == []
    assert stage.movement.status()["cascades_waiting"] == 0


async def test_a_tier_that_does_not_answer_keeps_no_other_from_being_cleared(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left out with its reason, and keeps what it has."""
    stage.medium.proceed.set()
    (key,) = stage.store(1)
    await stage.movement.hold([])
    with monkeypatch.context() as patch:
        patch.setattr(inspection, "TRY_AGAIN_S", 0.0)
        patch.setattr(stage.medium, "delete", refuse)
        parts = await cleared(stage, "memory", "pool")

    assert (parts[0]["tier"], "left alone" in str(parts[0]["left_out"])) == ("memory", True)
    assert (parts[1]["tier"], parts[1]["num_cleared"]) == ("pool", 1)
    assert list(stage.medium.keys()) == [key]


def refuse(keys: Sequence[BlockKey]) -> None:
    """A server that is away."""
    raise UnavailableError("nobody answers")


async def test_a_cleared_tier_serves_again(stage: Stage) -> None:
    """Afterwards blocks are admitted and found as before."""
    stage.medium.proceed.set()
    await cleared(stage, "memory")
    (key,) = stage.store(1)
    await stage.movement.hold([])

    assert await stage.tier.probe([key]) == [True]


async def test_nothing_is_found_in_a_tier_that_is_being_cleared(stage: Stage) -> None:
    """A promotion that is decided meanwhile would bring back what is just deleted."""
    stage.medium.proceed.set()
    (key,) = stage.store(1)
    await stage.movement.hold([stage.tier])

    assert not stage.tier.may_have(key)
    assert await stage.tier.probe([key]) == [False]
    stage.movement.let_go([stage.tier])
    assert await stage.tier.probe([key]) == [True]


async def test_two_do_not_clear_at_once(stage: Stage) -> None:
    """The second is told to wait, and the first is not disturbed."""
    stage.store(1)
    first = asyncio.create_task(cleared(stage, "memory"))
    await asyncio.sleep(0)

    with pytest.raises(InputError, match="wait until that has ended"):
        await cleared(stage, "pool")
    stage.medium.proceed.set()
    assert (await first)[0]["num_cleared"] == 1


async def test_why_admission_refused_is_remembered(stage: Stage) -> None:
    """For whoever asks later why a block was in no tier."""
    key = BlockKey(NAMESPACE, BlockHash(b"x" * 32))
    stage.tier.admission = AdmissionPolicy(
        AdmissionSettings(capacity_bytes=1 << 24, probation_share=0.0)
    )
    stage.tier.seen(key)

    assert stage.tier.refusal(key) is None
    assert not stage.tier.admits(key)
    assert "seen for the first time" in str(stage.tier.refusal(key))
