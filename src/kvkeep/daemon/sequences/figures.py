"""What is counted of sequences: one table of names and help texts, in memory of two processes.

The process that keeps the sequences writes, but for ``sequences_restarts``, and the daemon reads:
so its status is told without asking anybody. Counters stay when that process is started anew.
"""

import mmap
import os
from collections.abc import Iterator

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

COUNTERS = {
    "sequences_put": "sequences that were put, whole or layers of them",
    "sequences_appended": "appends that landed",
    "sequences_read": "sequences, or layers of one, that were sent whole",
    "sequences_missed": "requests for a sequence or layer that is not there",
    "sequences_deleted": "sequences that were forgotten on request",
    "sequences_evicted": "sequences that made room for others",
    "sequence_bytes_received": "bytes of the bodies that were put or appended",
    "sequence_bytes_sent": "bytes of tensors that were sent whole",
    "sequence_requests_refused": "requests that were refused, but for what is not there",
    "sequence_requests_cut": "requests whose body or reader did not come to an end",
    "sequences_restarts": "starts of the process that keeps them, after it ended by itself",
}
"""Name to help text; all are monotone integers. Prometheus adds ``kvkeep_`` and ``_total``."""

GAUGES = {
    "sequences": "sequences that can be read",
    "sequence_bytes": "what they take of `bytes_max`, costs of keeping them included",
    "sequence_transfer_bytes": "what requests in flight hold of `transfer_bytes_max`",
}
"""Name to help text."""

_PLACES = {name: place for place, name in enumerate([*COUNTERS, *GAUGES])}
_BYTES = 8 * len(_PLACES)


class SequenceFigures:
    """Counts, and tells what was counted."""

    def __init__(self, fd: int | None = None) -> None:
        """Make a board, or see the one that another process made.

        Args:
            fd: Of its memory, which stays the caller's.
        """
        self.fd = os.memfd_create("kvkeep-sequences") if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, _BYTES)
        self._values = np.frombuffer(mmap.mmap(self.fd, _BYTES), dtype=np.int64)

    def close(self) -> None:
        """Give the descriptor back; what was counted can still be read."""
        os.close(self.fd)

    def __getitem__(self, name: str) -> int:
        return int(self._values[_PLACES[name]])

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter, or to a gauge."""
        self._values[_PLACES[name]] += amount

    def note(self, name: str, value: int) -> None:
        """Say what a gauge shows now, or how far a counter has come."""
        self._values[_PLACES[name]] = value

    def counters(self) -> dict[str, int]:
        """Every counter of the table."""
        return {name: self[name] for name in COUNTERS}

    def gauges(self) -> dict[str, int]:
        """What stands now."""
        return {name: self[name] for name in GAUGES}

    def status(self) -> dict[str, object]:
        """For ``/status``."""
        return {"gauges": self.gauges(), "counters": self.counters()}

    def collect(self) -> Iterator[Metric]:
        """For Prometheus."""
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"kvkeep_{name}", text, value=self[name])
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"kvkeep_{name}", text, value=self[name])
