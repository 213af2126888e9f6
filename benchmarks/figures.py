"""What every benchmark prints: one JSON line per figure."""

import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Literal, TextIO


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound that a figure has to keep."""

    of: Literal["value", "ratio"]
    """What is bounded: the value in its unit, or its ratio to the peer."""
    relation: Literal[">=", "<="]
    bound: float

    def __str__(self) -> str:
        return f"{self.of} {self.relation} {self.bound:g}"

    def is_met(self, measured: float) -> bool:
        """Return whether a measured value or ratio keeps the bound."""
        return measured >= self.bound if self.relation == ">=" else measured <= self.bound


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured number, and what it is measured against in the same run."""

    figure: str
    """Name, as a user would search for it: ``copies.load.threads_2``."""
    value: float
    """The median, in ``unit``."""
    unit: str
    peer: float | None = None
    """The peer's median in the same unit; which peer is said in ``peer_name``."""
    peer_name: str | None = None
    target: Target | None = None
    spread: tuple[float, float] | None = None
    """Smallest and largest of the values behind the median."""
    samples: int | None = None
    """How many values are behind the median."""

    def __post_init__(self) -> None:
        if self.target is not None and self.target.of == "ratio" and self.peer is None:
            raise ValueError(f"a target of a ratio needs a peer. figure={self.figure}")

    @property
    def ratio(self) -> float | None:
        """The value over the peer's; ``None`` without a peer."""
        return None if self.peer is None else self.value / self.peer

    @property
    def met(self) -> bool | None:
        """Whether the target is kept; ``None`` without a target."""
        if self.target is None:
            return None
        measured = self.ratio if self.target.of == "ratio" else self.value
        return measured is not None and self.target.is_met(measured)

    def as_json(self) -> str:
        """Return the line that ``emit`` prints."""
        fields = {
            "figure": self.figure,
            "value": _rounded(self.value),
            "unit": self.unit,
            "peer": _rounded(self.peer),
            "ratio": _rounded(self.ratio),
            "target": None if self.target is None else str(self.target),
            "met": self.met,
            "peer_name": self.peer_name,
            "spread": None if self.spread is None else [_rounded(end) for end in self.spread],
            "samples": self.samples,
        }
        return json.dumps(fields)


def median_figure(
    figure: str,
    values: Sequence[float],
    unit: str,
    *,
    peer_values: Sequence[float] | None = None,
    peer_name: str | None = None,
    target: Target | None = None,
) -> Figure:
    """Return the figure of repeated measurements: their median, with their spread.

    Args:
        figure: Its name.
        values: At least one, in ``unit``.
        unit: The unit of ``values`` and ``peer_values``.
        peer_values: The peer's, measured in the same run, in turns with ``values``.
        peer_name: What the peer is.
        target: The bound to keep.
    """
    return Figure(
        figure=figure,
        value=statistics.median(values),
        unit=unit,
        peer=None if peer_values is None else statistics.median(peer_values),
        peer_name=peer_name,
        target=target,
        spread=(min(values), max(values)),
        samples=len(values),
    )


def emit(figure: Figure, stream: TextIO | None = None) -> None:
    """Print a figure as one JSON line, at once.

    Args:
        figure: What was measured.
        stream: Where to; standard output if ``None``.
    """
    print(figure.as_json(), file=stream or sys.stdout, flush=True)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
