"""The clock never goes back, and the wall clock is the one people read."""

from datetime import UTC, datetime

from kvkeep.model.clock import Clock, SystemClock, wall_clock_s


def test_the_monotonic_clock_never_goes_back() -> None:
    """Of two readings the later is not less."""
    clock: Clock = SystemClock()
    readings = [clock.now_s() for _ in range(100)]

    assert readings == sorted(readings)


def test_the_wall_clock_counts_from_1970() -> None:
    """The wall clock says the same as the calendar."""
    assert abs(wall_clock_s() - datetime.now(UTC).timestamp()) < 5.0
