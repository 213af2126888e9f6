"""One tier below the pool, as the event loop sees it."""

import asyncio
from collections.abc import Iterator, Sequence

import pytest

import kvkeep.daemon.movement.lower_tier as module
from kvkeep.core.admission import AdmissionPolicy, AdmissionSettings
from kvkeep.daemon.movement.lower_tier import DELETE_AGAIN_S, DELETE_BATCH, LowerTier
from kvkeep.model.errors import UnavailableError
from kvkeep.model.ids import BlockKey
from kvkeep.testing.tier_contract import block_key, in_parts, value_bytes
from kvkeep.tiers.base import Parts
from kvkeep.tiers.io_queue import QueueLimits, TierQueue
from kvkeep.tiers.memory import MemoryTier

LENGTH = 100
PAUSE_S = 2.0


class StepClock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def now_s(self) -> float:
        return self.now


class FailingTier(MemoryTier):
    """Refuses to write and to delete while it is told to."""

    is_failing = False

    def write(self, keys: Sequence[BlockKey], values: Sequence[Parts]) -> list[bool]:
        if self.is_failing:
            raise UnavailableError("gone")
        return super().write(keys, values)

    def delete(self, keys: Sequence[BlockKey]) -> None:
        if self.is_failing:
            raise UnavailableError("gone")
        super().delete(keys)


@pytest.fixture
def clock() -> StepClock:
    return StepClock()


@pytest.fixture
def medium() -> FailingTier:
    return FailingTier(1 << 20)


@pytest.fixture
def tier(clock: StepClock, medium: FailingTier) -> Iterator[LowerTier]:
    queue = TierQueue(medium, QueueLimits(failures_max=1, pause_s=PAUSE_S), clock)
    admission = AdmissionPolicy(AdmissionSettings(capacity_bytes=1 << 20))
    yield LowerTier(queue, admission, clock, value_bytes=LENGTH, is_local=False, probes_at_once=64)
    queue.close(5.0)


def write(tier: LowerTier, number: int) -> list[bool]:
    return asyncio.run(tier.write([block_key(number)], [in_parts(value_bytes(number, LENGTH))]))


def test_a_tier_that_failed_is_left_alone_and_tried_again_by_stores_alone(
    tier: LowerTier, clock: StepClock, medium: FailingTier
) -> None:
    """Nothing has to be looked for in it: after the pause the next block is the trial."""
    medium.is_failing = True
    assert tier.admits(block_key(1))
    with pytest.raises(UnavailableError, match="gone"):
        write(tier, 1)
    assert not tier.is_asked
    assert not tier.admits(block_key(2))

    medium.is_failing = False
    clock.now += PAUSE_S
    assert tier.admits(block_key(3))
    assert write(tier, 3) == [True]
    assert tier.is_asked
    assert tier.has(block_key(3))


async def ended(tier: LowerTier) -> None:
    """Wait until the queue has told the loop of all it did."""
    while tier._is_deleting:
        await asyncio.get_running_loop().run_in_executor(None, int)


@pytest.mark.parametrize("is_refused", [True, False])
async def test_what_is_to_be_deleted_is_not_given_until_it_is(
    tier: LowerTier, clock: StepClock, medium: FailingTier, is_refused: bool
) -> None:
    """Whether the tier is left alone when a block is found rotten, or fails to delete it."""
    key, other, value = block_key(1), block_key(2), in_parts(value_bytes(1, LENGTH))
    await tier.write([key, other], [value, value])
    medium.is_failing = True
    if is_refused:
        with pytest.raises(UnavailableError):
            await tier.write([block_key(3)], [value])
    tier.delete([key])
    await ended(tier)
    medium.is_failing = False
    clock.now += PAUSE_S

    assert (tier.may_have(key), tier.has(key), tier.admits(key)) == (False, False, False)
    assert await tier.probe([other, key]) == [True, False]
    room = [[memoryview(bytearray(LENGTH))] for _ in range(2)]
    assert await tier.read([other, key], room) == [LENGTH, None]
    assert medium.lookup([key]) == [True]

    clock.now += DELETE_AGAIN_S
    tier.tick()
    await ended(tier)
    assert medium.lookup([other, key]) == [True, False]
    assert tier.may_have(key)
    assert tier.admits(key)


async def test_what_is_to_be_deleted_has_a_limit(
    tier: LowerTier, medium: FailingTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more, the latest are kept in mind."""
    monkeypatch.setattr(module, "UNWANTED_MAX", 2)
    medium.is_failing = True
    tier.delete([block_key(number) for number in range(5)])
    await ended(tier)

    assert [tier.has(block_key(n)) or block_key(n) in tier._unwanted for n in range(5)] == [
        *[False] * 3,
        *[True] * 2,
    ]
    assert tier.status()["deletions_waiting"] == 2


async def test_many_blocks_are_deleted_in_batches(tier: LowerTier, medium: FailingTier) -> None:
    """One after the other, without waiting for a tick."""
    keys = [block_key(number) for number in range(2 * DELETE_BATCH + 1)]
    medium.write(keys, [in_parts(value_bytes(1, LENGTH)) for _ in keys])
    tier.delete(keys)
    await ended(tier)

    assert not any(medium.lookup(keys))
    assert tier.status()["deletions_waiting"] == 0
