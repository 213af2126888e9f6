"""A tier is written to and read before it serves."""

from collections.abc import Sequence

import pytest

from kvkeep.daemon.movement.proving import BATCH, Canaries, prove_tier
from kvkeep.model.errors import CorruptDataError, UnavailableError
from kvkeep.model.ids import BlockKey
from kvkeep.tiers.faulty import FaultyTier, TierFault
from kvkeep.tiers.memory import MemoryTier
from kvkeep.tiers.wrappers.verified import VerifiedTier

VALUE_BYTES = 3000


def tier(*faults: TierFault, capacity_bytes: int = 1 << 20) -> FaultyTier:
    """A tier that always goes wrong in these ways."""
    return FaultyTier(MemoryTier(capacity_bytes), dict.fromkeys(faults, 1.0), seed=1)


def test_a_good_tier_is_timed_in_two_sizes() -> None:
    """Latency and bandwidth can be told apart, and nothing is left in it."""
    proven = tier()
    samples = prove_tier(proven, VALUE_BYTES)

    assert [num_bytes for num_bytes, _ in samples] == [VALUE_BYTES, BATCH * VALUE_BYTES]
    assert all(seconds > 0 for _, seconds in samples)
    assert list(proven._inner.keys()) == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "fault", [TierFault.BIT_FLIP, TierFault.TRUNCATION, TierFault.SWAP], ids=lambda f: f.name
)
@pytest.mark.parametrize("deletes", [True, False])
def test_a_tier_that_gives_other_bytes_is_not_used(fault: TierFault, deletes: bool) -> None:
    """That stands even where what was written can't be deleted."""
    faulty = tier(fault)
    if not deletes:

        def fail(keys: Sequence[BlockKey]) -> None:
            raise UnavailableError("no")

        faulty.delete = fail  # type: ignore[method-assign]
    with pytest.raises(CorruptDataError, match="other bytes"):
        prove_tier(faulty, VALUE_BYTES)


def test_what_wrappers_do_not_believe_is_no_proof() -> None:
    """To a reader it is a miss, as if the tier had forgotten it."""
    verified = VerifiedTier(tier(TierFault.BIT_FLIP))

    def num_rejected() -> int:
        return sum(verified.counts().values())

    assert prove_tier(verified, VALUE_BYTES) == []
    with pytest.raises(CorruptDataError, match="other bytes"):
        prove_tier(verified, VALUE_BYTES, num_rejected)


def test_a_tier_that_declines_proves_nothing() -> None:
    """It has no room now; what it keeps later is checked by its wrappers."""
    assert prove_tier(tier(TierFault.DISK_FULL), VALUE_BYTES) == []


def test_a_tier_that_forgets_is_not_timed() -> None:
    """Room for three of eight values: only the single read may count."""
    assert len(prove_tier(tier(capacity_bytes=3 * VALUE_BYTES), VALUE_BYTES)) <= 1


def test_what_can_not_be_deleted_is_told_and_is_the_same_next_time() -> None:
    """Whoever owns the tier deletes it later; meanwhile it is no more than one batch."""
    inner, canaries = MemoryTier(1 << 20), Canaries()
    proven = FaultyTier(inner, {TierFault.READ_ONLY: 1.0}, seed=1)
    with pytest.raises(UnavailableError):
        prove_tier(proven, VALUE_BYTES, canaries=canaries)
    assert canaries.are_left
    canaries.are_left = False
    proven.write = inner.write  # type: ignore[method-assign]
    for _ in range(2):
        assert len(prove_tier(proven, VALUE_BYTES, canaries=canaries)) == 2

    assert canaries.are_left
    assert set(inner.keys()) == set(canaries.keys)


def test_a_tier_that_fails_says_so() -> None:
    """Its breaker finds out when it is back."""
    with pytest.raises(UnavailableError):
        prove_tier(tier(TierFault.IO_ERROR), VALUE_BYTES)
