"""Faults have names, strike by a seed, and are never a wrong byte behind a verifying tier."""

import errno
import threading
from collections.abc import Sequence

import pytest

from kvkeep.model.errors import UnavailableError
from kvkeep.testing.tier_contract import block_key, in_parts, read, value_bytes, write
from kvkeep.tiers.faulty import MOVED_SHARE, FaultyTier, TierFault
from kvkeep.tiers.memory import MemoryTier
from kvkeep.tiers.wrappers.verified import HEADER_BYTES, VerifiedTier

LENGTH = 3000
NUMBERS = range(20)
KEYS = [block_key(number, namespace=1 + number % 2) for number in NUMBERS]
VALUES = [value_bytes(number, LENGTH) for number in NUMBERS]
WAIT_S = 60.0


def filled(chances: dict[TierFault, float], seed: int = 1) -> FaultyTier:
    """A faulty tier that was well while twenty values of two tenants were written."""
    tier = FaultyTier(MemoryTier(1 << 20), {}, seed)
    assert tier.write(KEYS, [in_parts(value) for value in VALUES]) == [True] * len(KEYS)
    tier.chances = chances
    return tier


def test_the_same_seed_strikes_the_same() -> None:
    """A failure can be seen again."""
    chances = dict.fromkeys((TierFault.BIT_FLIP, TierFault.TRUNCATION, TierFault.SWAP), 0.3)
    first, second, other = (filled(chances, number) for number in (7, 7, 8))

    found = read(first, KEYS, LENGTH)
    assert found == read(second, KEYS, LENGTH)
    assert found != read(other, KEYS, LENGTH)


def test_a_bit_flip_is_one_bit() -> None:
    """Of each value that is struck."""
    found_all = read(filled({TierFault.BIT_FLIP: 1.0}), KEYS, LENGTH)
    for value, found in zip(VALUES, found_all, strict=True):
        assert found is not None
        changed = int.from_bytes(value) ^ int.from_bytes(found)
        assert changed.bit_count() == 1


def test_a_truncation_is_a_leading_part() -> None:
    """Shorter, and right as far as it goes."""
    found_all = read(filled({TierFault.TRUNCATION: 1.0}), KEYS, LENGTH)
    for value, found in zip(VALUES, found_all, strict=True):
        assert found is not None
        assert len(found) < LENGTH
        assert value.startswith(found)


def test_a_zeroed_value_has_its_length() -> None:
    """And nothing else."""
    assert read(filled({TierFault.ZEROED: 1.0}), KEYS, LENGTH) == [bytes(LENGTH)] * len(KEYS)


def test_a_moved_value_has_all_its_bytes_elsewhere() -> None:
    """Every part stands one place further on, the last one first."""
    step = LENGTH // MOVED_SHARE
    found_all = read(filled({TierFault.MOVED: 1.0}), KEYS, LENGTH)

    assert found_all == [value[-step:] + value[:-step] for value in VALUES]


@pytest.mark.parametrize("fault", [TierFault.SWAP, TierFault.WRONG_TENANT])
def test_a_swap_is_a_whole_value_of_another(fault: TierFault) -> None:
    """Of another tenant, where the fault says so."""
    for number, found in zip(NUMBERS, read(filled({fault: 1.0}), KEYS, LENGTH), strict=True):
        assert found in VALUES
        assert found != VALUES[number]
        if fault is TierFault.WRONG_TENANT:
            assert found is not None
            assert VALUES.index(found) % 2 != number % 2


def test_a_full_disk_declines() -> None:
    """And keeps what it has."""
    tier = filled({TierFault.DISK_FULL: 1.0})

    assert write(tier, [90, 91], LENGTH) == [False, False]
    assert read(tier, KEYS, LENGTH) == VALUES


@pytest.mark.parametrize(
    ("fault", "name", "is_read_failing"),
    [(TierFault.IO_ERROR, "EIO", True), (TierFault.READ_ONLY, "EROFS", False)],
)
def test_errors_are_those_of_a_medium(fault: TierFault, name: str, is_read_failing: bool) -> None:
    """A read-only medium still reads."""
    tier = filled({fault: 1.0})
    assert hasattr(errno, name)

    with pytest.raises(UnavailableError, match=name):
        write(tier, [90], LENGTH)
    if is_read_failing:
        with pytest.raises(UnavailableError, match=name):
            read(tier, KEYS, LENGTH)
    else:
        assert read(tier, KEYS, LENGTH) == VALUES
        with pytest.raises(UnavailableError, match=name):
            tier.delete(KEYS)


def test_a_cut_leaves_half_a_value_and_an_error() -> None:
    """The room has been written to, and nobody may believe it; nothing half is kept."""
    tier = filled({TierFault.CUT: 1.0})
    room = bytearray(LENGTH)
    with pytest.raises(UnavailableError, match="cut"):
        tier.read(KEYS[:1], [in_parts(room)])
    with pytest.raises(UnavailableError, match="cut"):
        write(tier, [90], LENGTH)

    assert room != VALUES[0]
    assert room != bytes(LENGTH)
    tier.chances = {}
    assert read(tier, [block_key(90)], LENGTH) == [None]


class StepClock:
    """A second older at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def now_s(self) -> float:
        self.now += 1.0
        return self.now


def test_slow_is_slow_by_a_factor() -> None:
    """Ten times as long as the call took by itself."""
    waits: list[float] = []
    tier = FaultyTier(MemoryTier(100), {TierFault.SLOW: 1.0}, 1, clock=StepClock())
    tier.sleep = waits.append
    read(tier, [block_key(1)], 10)

    assert waits == [9.0]


def test_a_call_hangs_until_it_is_released() -> None:
    """As one to a frozen server does when the server goes on."""
    tier = filled({TierFault.HANG: 1.0})
    found: list[Sequence[bytes | None]] = []
    thread = threading.Thread(target=lambda: found.append(read(tier, KEYS, LENGTH)))
    thread.start()
    assert tier.reached.wait(WAIT_S)
    assert found == []
    tier.release()
    thread.join(WAIT_S)

    assert found == [VALUES]
    assert read(tier, KEYS, LENGTH) == VALUES


@pytest.mark.parametrize("fault", list(TierFault))
@pytest.mark.parametrize("chance", [0.3, 1.0])
def test_verified_never_gives_a_wrong_byte(fault: TierFault, chance: float) -> None:
    """Each fault, often or always: a hit is right; when the fault is over, writing mends all."""
    faulty = FaultyTier(MemoryTier(1 << 20), {}, seed=3)
    tier = VerifiedTier(faulty)
    tier.write(KEYS, [in_parts(value, HEADER_BYTES) for value in VALUES])
    faulty.chances = {} if fault is TierFault.HANG else {fault: chance}
    faulty.sleep = lambda _seconds: None
    num_wrong = 0
    for _ in range(5):
        try:
            tier.write(KEYS, [in_parts(value) for value in VALUES])
            found = read(tier, KEYS, LENGTH)
        except UnavailableError:
            continue
        num_wrong += sum(f not in (None, v) for f, v in zip(found, VALUES, strict=True))

    assert num_wrong == 0
    assert faulty.num_struck[fault] or fault is TierFault.HANG
    faulty.chances = {}
    tier.write(KEYS, [in_parts(value) for value in VALUES])
    assert read(tier, KEYS, LENGTH) == VALUES
