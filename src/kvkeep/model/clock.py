"""Time as a value that is handed in: the only file that reads a clock."""

import time
from typing import Protocol


class Clock(Protocol):
    """A source of monotonic time."""

    def now_s(self) -> float:
        """Seconds since an arbitrary point; never goes back."""
        ...


class SystemClock:
    """The machine's monotonic clock, the same for every process of one host."""

    now_s = staticmethod(time.monotonic)
    """Seconds of CLOCK_MONOTONIC; asked for so often that a call of Python counts."""


def wall_clock_s() -> float:
    """Seconds since 1970, for people and for files that outlive a boot."""
    return time.time()
