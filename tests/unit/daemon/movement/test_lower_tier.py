"""One tier below the pool, as the event loop sees it."""

import asyncio
from collections.abc import Iterator, Sequence

import pytest

from kvkeep.core.admission import AdmissionPolicy, AdmissionSettings
from kvkeep.daemon.movement.lower_tier import LowerTier
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
    """Refuses to write while it is told to."""

    is_failing = False

    def write(self, keys: Sequence[BlockKey], values: Sequence[Parts]) -> list[bool]:
        if self.is_failing:
            raise UnavailableError("gone")
        return super().write(keys, values)


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
