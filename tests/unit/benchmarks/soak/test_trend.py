"""Slopes of sampled series, with an interval."""

import random

import pytest

from benchmarks.soak.trend import trend_of

SECONDS = range(0, 1800, 5)


def test_a_flat_noisy_series_has_an_interval_around_nothing() -> None:
    """Noise alone is not growth, whatever its size."""
    chance = random.Random(1)
    trend = trend_of([(s, 100 + chance.gauss(0, 5)) for s in SECONDS])

    assert trend.low < 0 < trend.high
    assert trend.median == pytest.approx(100, abs=1)


def test_growth_under_noise_is_found() -> None:
    """A leak of a tenth an hour is seen in half of one."""
    chance = random.Random(1)
    trend = trend_of([(s, 100 + s / 360 + chance.gauss(0, 0.5)) for s in SECONDS])

    assert 0 < trend.low < 10 < trend.high
    assert trend.slope == pytest.approx(10, rel=0.2)


def test_what_grows_only_at_first_is_flat() -> None:
    """Pools fill and caches warm: the first part does not count."""
    trend = trend_of([(s, min(s, 300.0)) for s in SECONDS])

    assert (trend.low, trend.slope, trend.high) == (0, 0, 0)


def test_neighbors_that_cling_together_rarely_look_like_growth() -> None:
    """Each value twenty times says no more than once: intervals stay as wide as they have to."""
    chance = random.Random(3)
    num_flat = 0
    for _ in range(200):
        values = [chance.gauss(0, 1) for _ in SECONDS[::20]]
        trend = trend_of([(s, values[n // 20]) for n, s in enumerate(SECONDS)])
        num_flat += trend.low <= 0 <= trend.high

    assert num_flat >= 170


def test_too_few_samples_are_refused() -> None:
    """No interval is made up."""
    with pytest.raises(ValueError, match="too few samples"):
        trend_of([(float(n), 1.0) for n in range(9)])
