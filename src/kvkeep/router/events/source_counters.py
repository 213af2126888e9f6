"""What became of the messages of a source of events."""

import dataclasses
from dataclasses import dataclass


@dataclass(slots=True)
class SourceCounters:
    """What happened; only grows."""

    num_batches: int = 0
    """Messages that were taken."""
    num_gaps: int = 0
    """How often numbers were missing."""
    num_replayed: int = 0
    """Messages that were asked for again and came."""
    num_dropped: int = 0
    """How often all that was known of the engine was forgotten."""
    num_refused: int = 0
    """Messages that were not what they should be."""
    num_losses: int = 0
    """How often a connection was lost."""

    def plus(self, other: "SourceCounters") -> "SourceCounters":
        """Return the sums."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return SourceCounters(*(one + two for one, two in pairs))
