"""Paired statistics: what tells two runs apart are the items on which they disagree."""

import pytest

from kvkeep.validate.statistics import compare_pairs, quantile, rate_max


def test_equal_averages_may_hide_a_difference() -> None:
    """As many items lost as won: equal averages, and the pairs show ten disagreements."""
    reference = [True] * 5 + [False] * 5 + [True] * 10
    candidate = [False] * 5 + [True] * 5 + [True] * 10

    paired = compare_pairs(reference, candidate)

    assert (paired.both, paired.only_reference, paired.only_candidate) == (10, 5, 5)
    assert paired.p_value == 1.0
    assert not paired.is_worse


@pytest.mark.parametrize(
    ("lost", "won", "p_value"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (8, 1, 0.0390625)],
)
def test_the_test_is_exact(lost: int, won: int, p_value: float) -> None:
    """Values of the binomial tail, worked out by hand."""
    paired = compare_pairs([True] * lost + [False] * won, [False] * lost + [True] * won)

    assert paired.p_value == pytest.approx(p_value)


def test_worse_is_more_than_chance() -> None:
    """Six items lost and none won is more than a coin does; five are not, nor six won."""
    six = ([True] * 6 + [True] * 50, [False] * 6 + [True] * 50)

    assert compare_pairs(*six).is_worse
    assert not compare_pairs([True] * 5, [False] * 5).is_worse
    assert not compare_pairs(*reversed(six)).is_worse


def test_missing_items_are_no_agreement() -> None:
    """Lists of two lengths can't be compared item by item."""
    with pytest.raises(ValueError, match="zip"):
        compare_pairs([True], [])


def test_quantiles_lie_between_neighbors() -> None:
    """The median of an even number is their middle; nothing has none."""
    assert quantile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5
    assert quantile([1.0, 2.0], 1.0) == 2.0
    assert quantile([], 0.5) is None


@pytest.mark.parametrize(
    ("seen", "tried", "bound"),
    [(0, 500, 0.00597), (0, 1, 0.95), (2, 10, 0.5069), (1, 500, 0.00945), (3, 3, 1.0)],
)
def test_a_rate_is_bounded_as_tables_have_it(seen: int, tried: int, bound: float) -> None:
    """Clopper and Pearson's upper limits; with none seen of 500 it is the rule of three."""
    assert rate_max(seen, tried) == pytest.approx(bound, rel=1e-3)


def test_nothing_tried_bounds_nothing() -> None:
    """Without a single pair any rate may be."""
    assert rate_max(0, 0) == 1.0
    assert rate_max(0, 500) == pytest.approx(3 / 500, rel=0.01)
