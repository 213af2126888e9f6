"""What a tier did and how fast it is, from its calls on a clock."""

from collections.abc import Callable, Sequence

import pytest

from kvkeep.model.errors import UnavailableError
from kvkeep.model.ids import BlockKey
from kvkeep.testing.tier_contract import block_key, read, write
from kvkeep.tiers.base import Parts, Probes
from kvkeep.tiers.faulty import FaultyTier, TierFault
from kvkeep.tiers.memory import MemoryTier
from kvkeep.tiers.wrappers.metered import MeteredTier, Speed

MIB = 1 << 20


class StepClock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def now_s(self) -> float:
        return self.now


class TimedTier(MemoryTier):
    """Takes a call's price and a price for each byte."""

    def __init__(self, clock: StepClock, call_s: float, byte_s: float) -> None:
        super().__init__(64 * MIB)
        self.clock, self.call_s, self.byte_s = clock, call_s, byte_s

    def read(self, keys: Sequence[BlockKey], into: Sequence[Parts]) -> list[int | None]:
        found = super().read(keys, into)
        self.clock.now += self.call_s + self.byte_s * sum(length or 0 for length in found)
        return found

    def write(self, keys: Sequence[BlockKey], values: Sequence[Parts]) -> list[bool]:
        self.clock.now += 1.0
        return super().write(keys, values)


@pytest.fixture
def clock() -> StepClock:
    """Stands still but for calls."""
    return StepClock()


def test_nothing_is_known_at_first(clock: StepClock) -> None:
    """An estimate without a measurement is none; a miss is no measurement."""
    tier = MeteredTier(TimedTier(clock, 0.5, 1e-6), clock)
    read(tier, [block_key(1)], 10)

    assert tier.estimate_read_s(1000) is None
    assert tier.meter().estimate_write_s(1000) is None


def test_latency_and_bandwidth_are_told_apart(clock: StepClock) -> None:
    """From calls of several sizes follows what a call costs and what a byte costs."""
    tier = MeteredTier(TimedTier(clock, call_s=0.25, byte_s=1e-5), clock)
    for number, length in enumerate((1000, 50_000, 200_000)):
        write(tier, [number], length)
        read(tier, [block_key(number)], length)

    meter = tier.meter().read
    assert meter.call_s == pytest.approx(0.25)
    assert meter.bytes_per_s == pytest.approx(1e5)
    assert tier.estimate_read_s(300_000) == pytest.approx(3.25)


def test_calls_of_one_size_give_a_bandwidth(clock: StepClock) -> None:
    """Where sizes do not differ, all the time is put down to the bytes."""
    tier = MeteredTier(TimedTier(clock, call_s=0.5, byte_s=0.0), clock)
    write(tier, [1], 1000)
    for _ in range(3):
        read(tier, [block_key(1)], 1000)

    assert tier.estimate_read_s(2000) == pytest.approx(1.0)


def test_a_tier_that_became_slow_is_known_to_be_slow(clock: StepClock) -> None:
    """Twenty slow calls outweigh a thousand quick ones."""
    inner = TimedTier(clock, 0.0, 1e-6)
    tier = MeteredTier(inner, clock)
    write(tier, [1], 1000)
    for _ in range(1000):
        read(tier, [block_key(1)], 1000)
    inner.byte_s = 1e-3
    for _ in range(20):
        read(tier, [block_key(1)], 1000)

    estimate_s = tier.estimate_read_s(1000)
    assert estimate_s is not None
    assert estimate_s > 0.8


def test_calls_keys_and_bytes_are_counted(clock: StepClock) -> None:
    """Hits and misses, kept and declined, bytes and busy time."""
    tier = MeteredTier(TimedTier(clock, 2.0, 0.0), clock)
    write(tier, [1, 2], 300)
    read(tier, [block_key(number) for number in (1, 2, 3)], 300)
    tier.delete([block_key(1)])
    assert isinstance(tier, Probes)
    tier.lookup([block_key(1), block_key(2)])

    meter = tier.meter()
    assert (meter.write.num_calls, meter.write.num_done, meter.write.num_bytes) == (1, 2, 600)
    assert (meter.read.num_done, meter.read.num_undone, meter.read.num_bytes) == (2, 1, 600)
    assert (meter.write.busy_s, meter.read.busy_s) == (1.0, 2.0)
    assert (meter.delete.num_calls, meter.delete.num_keys) == (1, 1)
    assert (meter.probe.num_done, meter.probe.num_undone) == (1, 1)


def test_a_declined_value_is_no_byte(clock: StepClock) -> None:
    """Only what is kept was moved."""
    tier = MeteredTier(MemoryTier(1000), clock)

    assert write(tier, [1], 2000) == [False]
    assert (tier.meter().write.num_undone, tier.meter().write.num_bytes) == (1, 0)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda tier: read(tier, [block_key(1)], 10), "read"),
        (lambda tier: write(tier, [1], 10), "write"),
        (lambda tier: tier.delete([block_key(1)]), "delete"),
    ],
)
def test_errors_are_counted_and_passed_on(
    clock: StepClock, call: Callable[[MeteredTier], object], name: str
) -> None:
    """A failed call is a call; its error is the caller's to see."""
    faults = {TierFault.IO_ERROR: 1.0, TierFault.READ_ONLY: 1.0}
    tier = MeteredTier(FaultyTier(MemoryTier(1000), faults, seed=1), clock)

    with pytest.raises(UnavailableError):
        call(tier)

    meter = getattr(tier.meter(), name)
    assert (meter.num_calls, meter.num_errors, meter.num_keys) == (1, 1, 0)


def test_a_tilted_line_is_not_believed() -> None:
    """Where large calls happened to be quicker, no byte is thought to cost less than nothing."""
    speed = Speed()
    speed.add(1000, 2.0)
    speed.add(4000, 1.0)

    line = speed.line()
    assert line is not None
    assert line[0] == 0.0
    assert line[1] > 0
