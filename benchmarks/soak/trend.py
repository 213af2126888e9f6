"""Whether a series of samples grows: its slope, with an interval that heeds how samples cling."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

NUM_BATCHES = 10
"""Neighboring samples resemble one another; means of so many stretches hardly do."""
T_95 = 2.306
"""Student's t, two-sided 95 %, for the 8 degrees of freedom of a line through 10 points."""
WARM_UP_SHARE = 0.3
"""Of the time, from the start: pools fill, allocators settle, caches reach their size."""


@dataclass(frozen=True)
class Trend:
    """A line through the samples after the warm-up."""

    median: float
    slope: float
    """Units an hour."""
    low: float
    """Lower end of the slope's 95 % interval."""
    high: float
    num_samples: int


def trend_of(samples: Sequence[tuple[float, float]]) -> Trend:
    """Fit a line.

    Args:
        samples: Seconds and value, in the order of time; at least 15.
    """
    begun_s, ended_s = samples[0][0], samples[-1][0]
    first_s = begun_s + WARM_UP_SHARE * (ended_s - begun_s)
    kept = [sample for sample in samples if sample[0] >= first_s]
    if len(kept) < NUM_BATCHES:
        raise ValueError(f"too few samples for a trend. samples={len(kept)}")
    edges = [len(kept) * idx // NUM_BATCHES for idx in range(NUM_BATCHES + 1)]
    batches = [kept[start:end] for start, end in itertools.pairwise(edges)]
    hours = [statistics.fmean(time_s for time_s, _ in batch) / 3600 for batch in batches]
    values = [statistics.fmean(value for _, value in batch) for batch in batches]
    slope, intercept = statistics.linear_regression(hours, values)
    residuals = [v - intercept - slope * h for h, v in zip(hours, values, strict=True)]
    mean_hour = statistics.fmean(hours)
    spread = sum((hour - mean_hour) ** 2 for hour in hours)
    error = math.sqrt(sum(r * r for r in residuals) / (NUM_BATCHES - 2) / spread)
    return Trend(
        median=statistics.median(value for _, value in kept),
        slope=slope,
        low=slope - T_95 * error,
        high=slope + T_95 * error,
        num_samples=len(kept),
    )
