"""Figures that say whether their target is decided."""

import json

import pytest

from benchmarks.figures import Target
from benchmarks.ratios import flatten, ratio_figure, ratio_interval

TARGET = Target("ratio", "<=", 1.2)


def test_a_ratio_far_below_its_target_is_met() -> None:
    """A target above the whole interval is kept."""
    figure = ratio_figure("f", [[0.050, 0.051, 0.052] * 3], [[0.050] * 9], "peer", target=TARGET)

    assert figure.met is True


def test_a_ratio_far_above_its_target_is_not_met() -> None:
    """A target below the whole interval is missed, not undecided."""
    figure = ratio_figure("f", [[0.080, 0.081, 0.082] * 3], [[0.050] * 9], "peer", target=TARGET)

    assert figure.met is False


def test_a_target_inside_the_interval_is_not_resolved() -> None:
    """Repetitions on both sides of the target decide nothing, and the line says why."""
    over = [[0.050, 0.070, 0.059, 0.061, 0.055, 0.065]]

    figure = ratio_figure("f", over, [[0.050] * 6], "peer", target=TARGET)

    printed = json.loads(figure.as_json())
    assert printed["met"] is None
    assert printed["interval"][0] < 1.2 < printed["interval"][1]
    assert "interval" in printed["not_resolved"]


def test_a_busy_machine_decides_nothing() -> None:
    """Targets stay open where other work took the processors, however good the ratio is."""
    figure = ratio_figure("f", [[0.05] * 9], [[0.05] * 9], "peer", target=TARGET, is_quiet=False)

    assert figure.met is None
    assert json.loads(figure.as_json())["not_resolved"] == "the machine was busy"


def test_times_are_printed_in_milliseconds() -> None:
    """Seconds go in, milliseconds come out, for the value and for the peer."""
    printed = json.loads(ratio_figure("f", [[0.06] * 3], [[0.05] * 3], "peer").as_json())

    assert (printed["value"], printed["peer"], printed["unit"]) == (60, 50, "ms")
    assert printed["ratio"] == pytest.approx(1.2)
    assert printed["samples"] == 3


def test_rounds_that_disagree_widen_the_interval() -> None:
    """Drift between rounds counts, not only the spread within one."""
    same = ratio_interval([[1.0] * 9, [1.0] * 9, [1.0] * 9], [[1.0] * 9] * 3)
    drifting = ratio_interval([[0.8] * 9, [1.0] * 9, [1.3] * 9], [[1.0] * 9] * 3)

    assert same == (1.0, 1.0)
    assert drifting[0] < 1.0 < drifting[1]


def test_an_interval_is_the_same_for_the_same_seed() -> None:
    """A run can be repeated from its repetitions."""
    rounds = [[0.9, 1.0, 1.2, 1.05]]

    assert ratio_interval(rounds, rounds, seed=7) == ratio_interval(rounds, rounds, seed=7)
    assert flatten(rounds) == rounds[0]
