"""When to leave a tier alone, and when to try it again.

A tier that fails costs every caller its time limit, so after some failures in a row nobody asks it
any more for a while. Then one caller tries, and what it finds decides for all.
"""

from enum import Enum

from kvkeep.model.errors import InvariantError


class BreakerState(Enum):
    """Whether calls go through."""

    CLOSED = "closed"
    """As a circuit: they do."""
    OPEN = "open"
    """They do not, until the pause is over."""
    HALF_OPEN = "half_open"
    """One does, and decides."""


class BreakerMove(Enum):
    """What can happen to a breaker."""

    TRIPPED = "tripped"
    TRIAL_BEGUN = "trial begun"
    TRIAL_FINISHED = "trial finished"
    TRIAL_FAILED = "trial failed"


TRANSITIONS: dict[BreakerState, dict[BreakerMove, BreakerState]] = {
    BreakerState.CLOSED: {BreakerMove.TRIPPED: BreakerState.OPEN},
    BreakerState.OPEN: {BreakerMove.TRIAL_BEGUN: BreakerState.HALF_OPEN},
    BreakerState.HALF_OPEN: {
        BreakerMove.TRIAL_FINISHED: BreakerState.CLOSED,
        BreakerMove.TRIAL_FAILED: BreakerState.OPEN,
    },
}
"""The legal moves; anything else is a defect of kvkeep."""


class Breaker:
    """The circuit breaker of one tier; pure, and not thread-safe.

    A caller begins with a ticket and reports how it went: ``finish``, ``fail`` or ``give_up``, each
    ticket's first report counts. Every move makes all tickets before it stale, and what a stale
    ticket reports is ignored: a call that began before the breaker opened says nothing about now.
    """

    def __init__(self, failures_max: int, pause_s: float) -> None:
        """Be closed; open after ``failures_max`` failures in a row, for ``pause_s``."""
        self.state = BreakerState.CLOSED
        self.num_trips = 0
        """Moves to OPEN since the start."""
        self._failures_max = failures_max
        self._pause_s = pause_s
        self._num_failures = 0
        self._open_until_s = 0.0
        self._round = 0

    def is_admitting(self, now_s: float) -> bool:
        """Whether ``begin`` would give a ticket."""
        if self.state is BreakerState.OPEN:
            return now_s >= self._open_until_s
        return self.state is BreakerState.CLOSED

    def begin(self, now_s: float) -> int | None:
        """A ticket for one call; None if the tier is to be left alone."""
        if not self.is_admitting(now_s):
            return None
        if self.state is BreakerState.OPEN:
            self._move(BreakerMove.TRIAL_BEGUN)
        return self._round

    def is_current(self, ticket: int) -> bool:
        """Whether nothing has changed since the ticket was given."""
        return ticket == self._round

    def finish(self, ticket: int) -> None:
        """The call went well."""
        if not self.is_current(ticket):
            return
        self._num_failures = 0
        if self.state is BreakerState.HALF_OPEN:
            self._move(BreakerMove.TRIAL_FINISHED)

    def fail(self, ticket: int, now_s: float) -> None:
        """The call went wrong."""
        if not self.is_current(ticket):
            return
        self._num_failures += 1
        if self.state is BreakerState.HALF_OPEN or self._num_failures >= self._failures_max:
            self.give_up(ticket, now_s)

    def give_up(self, ticket: int, now_s: float) -> None:
        """The call takes too long: whoever comes next would wait as well."""
        if not self.is_current(ticket):
            return
        is_trial = self.state is BreakerState.HALF_OPEN
        self._move(BreakerMove.TRIAL_FAILED if is_trial else BreakerMove.TRIPPED)
        self._num_failures = 0
        self._open_until_s = now_s + self._pause_s
        self.num_trips += 1

    def _move(self, move: BreakerMove) -> None:
        after = TRANSITIONS[self.state].get(move)
        if after is None:
            raise InvariantError(f"illegal move. breaker={self.state.value} move={move.value}")
        self.state = after
        self._round += 1
