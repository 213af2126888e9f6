"""Work fades, and only what is above the mean counts."""

import pytest

from kvkeep.router.policies.recent_work import HORIZON_S, RecentWork


def test_only_what_is_above_the_mean_counts() -> None:
    """Of two endpoints, the one with more work has half the difference too much."""
    recent = RecentWork()
    recent.give("e0", 600, 0.0)
    recent.give("e1", 200, 0.0)

    assert recent.excess(["e0", "e1"], 0.0) == pytest.approx([200.0, 0.0])
    assert recent.excess(["e0"], 0.0) == [0.0]
    assert recent.excess([], 0.0) == []


def test_work_fades() -> None:
    """After the horizon a third is left; what is added later counts in full."""
    recent = RecentWork()
    recent.give("e0", 1000, 0.0)
    recent.give("e0", 1000, HORIZON_S)

    assert recent.excess(["e0", "e1"], HORIZON_S) == pytest.approx([684.0, 0.0], abs=1.0)
    recent.left("e0")
    assert recent.excess(["e0", "e1"], HORIZON_S) == [0.0, 0.0]
