"""Paired statistics: the same items asked twice, compared item by item.

Two averages that lie within a tolerance say little: as many items may have become wrong as became
right. What tells two runs apart are the items on which they disagree, and whether those lean to one
side more than chance does (McNemar 1947). Pure; standard library only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SIGNIFICANCE = 0.05
CONFIDENCE = 0.95
HALVINGS = 60
"""Of the interval that holds a bound: more than a float can tell apart."""


@dataclass(frozen=True, slots=True)
class Paired:
    """Two runs over the same items."""

    both: int
    """Items that both got right."""
    only_reference: int
    only_candidate: int
    neither: int

    @property
    def num_items(self) -> int:
        """All items."""
        return self.both + self.only_reference + self.only_candidate + self.neither

    @property
    def p_value(self) -> float:
        """Two-sided exact McNemar: how likely at least this lean is where both are equally good.

        Under that assumption each item on which the runs disagree falls to either side like a
        coin. 1.0 where they agree on every item.
        """
        num = self.only_reference + self.only_candidate
        fewer = min(self.only_reference, self.only_candidate)
        tail = sum(math.comb(num, i) for i in range(fewer + 1))
        return min(1.0, float(2 * tail) / float(1 << num))

    @property
    def is_worse(self) -> bool:
        """Whether the candidate gets more items wrong than chance explains."""
        return self.only_reference > self.only_candidate and self.p_value < SIGNIFICANCE

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "both": self.both,
            "only_reference": self.only_reference,
            "only_candidate": self.only_candidate,
            "neither": self.neither,
            "p_value": self.p_value,
        }


def compare_pairs(reference: Sequence[bool], candidate: Sequence[bool]) -> Paired:
    """Count agreement item by item; both lists are in the same order.

    Raises:
        ValueError: They are not of one length: items are missing.
    """
    pairs = list(zip(reference, candidate, strict=True))
    return Paired(
        pairs.count((True, True)),
        pairs.count((True, False)),
        pairs.count((False, True)),
        pairs.count((False, False)),
    )


def rate_max(num_seen: int, num_tried: int, confidence: float = CONFIDENCE) -> float:
    """The largest rate with which so few would be seen (Clopper and Pearson 1934, one-sided).

    Exact for independent tries; where none was seen it is about 3 / ``num_tried``, the rule of
    three.

    Args:
        num_seen: How often it happened.
        num_tried: How often it could have.
        confidence: How sure the bound is, 0 to 1.

    Returns:
        A rate, 0 to 1; 1.0 where nothing was tried or everything was seen.
    """
    if num_seen >= num_tried:
        return 1.0
    low, high = num_seen / num_tried, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if _at_most(num_seen, num_tried, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _at_most(num_seen: int, num_tried: int, rate: float) -> float:
    """How likely no more than so many of all happen at this rate: the binomial's lower tail."""
    if rate <= 0.0 or rate >= 1.0:
        return 1.0 if rate <= 0.0 else 0.0
    logs = math.lgamma(num_tried + 1), math.log(rate), math.log1p(-rate)
    return math.fsum(
        math.exp(
            logs[0]
            - math.lgamma(i + 1)
            - math.lgamma(num_tried - i + 1)
            + i * logs[1]
            + (num_tried - i) * logs[2]
        )
        for i in range(num_seen + 1)
    )


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value below which a share of all lie, between neighbors in proportion; None of nothing.

    Args:
        values: In any order.
        share: 0 to 1.
    """
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread_s(values: Sequence[float]) -> dict[str, float | None]:
    """Median, 90th and 99th percentile of some durations, in seconds."""
    return {f"p{round(100 * share)}": quantile(values, share) for share in (0.5, 0.9, 0.99)}
