"""Ratios of medians that come with an interval: a figure says whether its target is decided.

Two engines never run at the same moment on two cores, so a ratio between them carries the drift of
the machine from one round to the next. The interval is a bootstrap over the rounds and, within a
round, over its repetitions.
"""

import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.figures import Figure, Target

DRAWS = 2000
ROUNDS_RESAMPLED_MIN = 3
"""With fewer rounds than this a resample of them says nothing."""

Rounds = Sequence[Sequence[float]]
"""Repetitions by round."""


@dataclass(frozen=True)
class IntervalFigure(Figure):
    """A figure whose ratio has a 95 % interval; a target inside of it is not decided."""

    interval: tuple[float, float] | None = None
    """Of the ratio."""
    is_quiet: bool = True
    """Whether other work left the machine alone; where not, no target is decided."""

    @property
    def met(self) -> bool | None:
        """Whether the target is kept; ``None`` without a target, or when it is not resolved."""
        if not self.is_quiet:
            return None
        if self.interval is None or self.target is None or self.target.of != "ratio":
            return super().met
        low, high = self.interval
        return None if low <= self.target.bound < high else super().met

    def as_json(self) -> str:
        """Return the line that ``emit`` prints, with the interval and why ``met`` is null."""
        fields = json.loads(super().as_json())
        if self.interval is not None:
            fields["interval"] = [float(f"{end:.4g}") for end in self.interval]
        if self.target is not None and self.met is None:
            fields["not_resolved"] = (
                "the target lies inside the interval" if self.is_quiet else "the machine was busy"
            )
        return json.dumps(fields)


def flatten(rounds: Rounds) -> list[float]:
    """Return all repetitions of all rounds."""
    return [value for values in rounds for value in values]


def ratio_interval(over: Rounds, under: Rounds, seed: int = 1) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of median(over) / median(under).

    Args:
        over: Repetitions of the figure, by round; no round is empty.
        under: The peer's, by the same rounds.
        seed: Of the resampling.
    """
    chance = random.Random(seed)
    num_rounds = min(len(over), len(under))
    ratios = []
    for _ in range(DRAWS):
        picked: Sequence[int] = range(num_rounds)
        if num_rounds >= ROUNDS_RESAMPLED_MIN:
            picked = chance.choices(picked, k=num_rounds)
        ratios.append(_draw(over, picked, chance) / _draw(under, picked, chance))
    ratios.sort()
    return ratios[int(0.025 * DRAWS)], ratios[int(0.975 * DRAWS) - 1]


def _draw(rounds: Rounds, picked: Sequence[int], chance: random.Random) -> float:
    drawn: list[float] = []
    for index in picked:
        drawn += chance.choices(rounds[index], k=len(rounds[index]))
    return statistics.median(drawn)


def ratio_figure(
    figure: str,
    over: Rounds,
    under: Rounds,
    peer_name: str,
    *,
    target: Target | None = None,
    is_quiet: bool = True,
) -> IntervalFigure:
    """Return the figure of milliseconds over a peer's, both given in seconds by round."""
    values = flatten(over)
    return IntervalFigure(
        figure=figure,
        value=1e3 * statistics.median(values),
        unit="ms",
        peer=1e3 * statistics.median(flatten(under)),
        peer_name=peer_name,
        target=target,
        spread=(1e3 * min(values), 1e3 * max(values)),
        samples=len(values),
        interval=ratio_interval(over, under),
        is_quiet=is_quiet,
    )


def paired_figure(
    figure: str, pairs: Sequence[tuple[float, float]], target: Target | None, *, is_quiet: bool
) -> IntervalFigure:
    """Return the median of paired ratios: each pair is of one moment, so that drift cancels.

    Args:
        figure: Its name.
        pairs: Seconds of the subject and of its peer.
        target: Of the ratio.
        is_quiet: Whether other work left the machine alone.
    """
    ratios = [mine / theirs for mine, theirs in pairs]
    times = [1e3 * mine for mine, _ in pairs]
    return IntervalFigure(
        figure=figure,
        value=statistics.median(times),
        unit="ms",
        peer=statistics.median(times) / statistics.median(ratios),
        peer_name="the other of each pair",
        target=target,
        spread=(min(times), max(times)),
        samples=len(pairs),
        interval=_median_interval(ratios),
        is_quiet=is_quiet,
    )


def _median_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    chance = random.Random(1)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(DRAWS))
    return medians[int(0.025 * DRAWS)], medians[int(0.975 * DRAWS) - 1]
