"""What the self-test says of false alarms: how many, and how frequent they are at most."""

from kvkeep.cli.check_self_test import sentence_of_alarms
from kvkeep.validate.self_test.score import StandScore


def test_no_alarm_is_said_with_its_bound() -> None:
    """None of 500 is no proof of none: the rule of three stands beside it."""
    found = StandScore("stack", exact=False, pairs=500, floor_prompts=8)

    assert sentence_of_alarms(found) == (
        "500 pairs without a fault, 8 others set the noise floor: 0 false alarms; with 95% "
        "confidence at most 0.60% of pairs"
    )


def test_without_a_floor_none_is_named() -> None:
    """The exact mode measures none, and every alarm raises the bound."""
    found = StandScore("stack", exact=True, pairs=500, false_alarms=2)

    assert "floor" not in sentence_of_alarms(found)
    assert "2 false alarms; with 95% confidence at most 1.25% of pairs" in sentence_of_alarms(found)
