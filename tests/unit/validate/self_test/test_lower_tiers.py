"""Wrong reads of a lower tier are refused, every one."""

import pytest

from kvkeep.tiers.faulty import WRONG_READS
from kvkeep.tiers.wrappers import verified
from kvkeep.validate.self_test.lower_tiers import NUM_VALUES, score_tiers


def test_every_wrong_read_is_refused() -> None:
    """By kind: as many as were planted, and no wrong value was given out."""
    found = score_tiers(rounds=1, seed=3)

    assert [each.fault for each in found] == list(WRONG_READS)
    assert {(each.planted, each.caught, each.wrong_values) for each in found} == {
        (NUM_VALUES, NUM_VALUES, 0)
    }


def test_without_verification_wrong_values_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verification that finds nothing gives out what was planted."""
    monkeypatch.setattr(verified, "_find_fault", lambda *_: None)

    assert any(each.wrong_values for each in score_tiers(rounds=1, seed=3))
