"""Who goes on, who waits and who is refused when more is asked than can run at once.

Pure: visits in, decisions out, told the time. Nobody waits longer than announced, no more wait than
there is room for, and whoever asks much makes those wait who ask much: room goes to the holder with
the fewest requests running, and a full queue drops the newest request of whoever waits with most.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import ceil

import msgspec

from kvkeep.model.errors import InvariantError

RETRY_AFTER_S_MAX = 60
"""What is announced at most: an estimate does not reach further."""
_RECENT = 0.1
"""Weight of the newest visit in the moving average of how long visits last."""


class VisitState(Enum):
    """What a request may do."""

    NEW = "new"
    ADMITTED = "admitted"
    WAITING = "waiting"
    REFUSED = "refused"
    GONE = "gone"

    __hash__ = object.__hash__  # members are singletons; Enum's own hash is a call of Python


class VisitMove(Enum):
    """What can happen to it."""

    LET_IN = "let in"
    QUEUED = "queued"
    REFUSED = "refused"
    LEFT = "left"

    __hash__ = object.__hash__  # members are singletons; Enum's own hash is a call of Python


TRANSITIONS: dict[VisitState, dict[VisitMove, VisitState]] = {
    VisitState.NEW: {
        VisitMove.LET_IN: VisitState.ADMITTED,
        VisitMove.QUEUED: VisitState.WAITING,
        VisitMove.REFUSED: VisitState.REFUSED,
    },
    VisitState.WAITING: {
        VisitMove.LET_IN: VisitState.ADMITTED,
        VisitMove.REFUSED: VisitState.REFUSED,
        VisitMove.LEFT: VisitState.GONE,
    },
    VisitState.ADMITTED: {VisitMove.LEFT: VisitState.GONE},
}
"""The legal moves; anything else is a defect of kvkeep."""
_NO_MOVES: dict[VisitMove, VisitState] = {}


class Visit(msgspec.Struct, eq=False):
    """One request, from its arrival to its end."""

    holder: str
    """Who asks: fairness is between holders."""
    state: VisitState = VisitState.NEW
    since_s: float = 0.0
    """When it arrived, and then when it was let in."""
    why: str = ""
    """Of a refusal: ``queue_full`` or ``queue_timeout``."""
    num_tokens: int = 0
    """About how many the prompt has; what was taken of the holder's rate."""

    def move(self, move: VisitMove, now_s: float) -> None:
        """Take a step.

        Raises:
            InvariantError: The step is not legal.
        """
        after = TRANSITIONS.get(self.state, _NO_MOVES).get(move)
        if after is None:
            raise InvariantError(f"illegal move. visit={self.state.value} move={move.value}")
        self.state, self.since_s = after, now_s


@dataclass(slots=True, eq=False)
class _Holder:
    num_running: int = 0
    waiting: dict[Visit, None] = field(default_factory=dict)
    """In the order of their arrival."""
    turn: int = 0
    """When it was last let in, counted in visits."""

    @property
    def is_idle(self) -> bool:
        return not self.num_running and not self.waiting


class AdmissionQueue:
    """Requests that run, and those that wait for their turn."""

    def __init__(self, running_max: int, waiting_max: int, wait_s_max: float) -> None:
        """Be empty; ``running_max`` of 0 is no limit at all."""
        self._running_max = running_max
        self._waiting_max, self._wait_s_max = waiting_max, wait_s_max
        self._holders: dict[str, _Holder] = {}
        self._waiting: dict[Visit, None] = {}
        self._turn = 0
        self._mean_visit_s = 0.0
        self.num_running = 0

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def next_deadline_s(self) -> float | None:
        """When ``expire`` has something to do; None while nobody waits."""
        first = next(iter(self._waiting), None)
        return None if first is None else first.since_s + self._wait_s_max

    def num_present(self, holder: str) -> int:
        """Requests of a holder that run or wait."""
        found = self._holders.get(holder)
        return 0 if found is None else found.num_running + len(found.waiting)

    def retry_after_s(self) -> int:
        """Whole seconds after which there is likely to be room."""
        per_place_s = self._mean_visit_s / max(1, self._running_max)
        wait_s = ceil((self.num_waiting + 1) * per_place_s)
        return min(RETRY_AFTER_S_MAX, max(1, wait_s))

    def arrive(self, visit: Visit, now_s: float) -> Sequence[Visit]:
        """Let a new visit in, queue it or refuse it; its state says which.

        Returns:
            Visits of others that were waiting and are refused for it.
        """
        holder = self._holders.get(visit.holder)
        if holder is None:
            holder = self._holders[visit.holder] = _Holder()
        if self._has_room and not self._waiting:
            self._let_in(visit, holder, now_s)
            return ()
        pushed: Sequence[Visit] = ()
        if len(self._waiting) >= self._waiting_max:
            greediest = max(self._holders.values(), key=lambda other: len(other.waiting))
            # A swap that would only mirror the difference helps nobody.
            if len(greediest.waiting) <= len(holder.waiting) + 1:
                visit.why = "queue_full"
                visit.move(VisitMove.REFUSED, now_s)
                self._forget_idle(visit.holder, holder)
                return ()
            newest = next(reversed(greediest.waiting))
            self._refuse(newest, "queue_full", now_s)
            pushed = (newest,)
        visit.move(VisitMove.QUEUED, now_s)
        holder.waiting[visit] = self._waiting[visit] = None
        return pushed

    def leave(self, visit: Visit, now_s: float) -> Sequence[Visit]:
        """A visit ended, or was given up while it waited; of a refused one nothing is left to end.

        Returns:
            Visits that were waiting and are let in.
        """
        if visit.state is VisitState.REFUSED:
            return ()
        holder = self._holders[visit.holder]
        if visit.state is VisitState.WAITING:
            del holder.waiting[visit], self._waiting[visit]
        else:
            self._mean_visit_s += _RECENT * (now_s - visit.since_s - self._mean_visit_s)
            holder.num_running -= 1
            self.num_running -= 1
        visit.move(VisitMove.LEFT, now_s)
        self._forget_idle(visit.holder, holder)
        return self._fill(now_s) if self._waiting else ()

    def expire(self, now_s: float) -> Sequence[Visit]:
        """Refuse whoever waited too long.

        Returns:
            Those, oldest first.
        """
        late: list[Visit] = []
        while (deadline_s := self.next_deadline_s) is not None and deadline_s <= now_s:
            visit = next(iter(self._waiting))
            self._refuse(visit, "queue_timeout", now_s)
            late.append(visit)
        return late

    @property
    def _has_room(self) -> bool:
        return not self._running_max or self.num_running < self._running_max

    def _fill(self, now_s: float) -> Sequence[Visit]:
        admitted: list[Visit] = []
        while self._waiting and self._has_room:
            holder = min(
                (holder for holder in self._holders.values() if holder.waiting),
                key=lambda holder: (holder.num_running, holder.turn),
            )
            visit = next(iter(holder.waiting))
            del holder.waiting[visit], self._waiting[visit]
            self._let_in(visit, holder, now_s)
            admitted.append(visit)
        return admitted

    def _let_in(self, visit: Visit, holder: _Holder, now_s: float) -> None:
        visit.move(VisitMove.LET_IN, now_s)
        holder.num_running += 1
        self.num_running += 1
        self._turn += 1
        holder.turn = self._turn

    def _refuse(self, visit: Visit, why: str, now_s: float) -> None:
        holder = self._holders[visit.holder]
        del holder.waiting[visit], self._waiting[visit]
        visit.why = why
        visit.move(VisitMove.REFUSED, now_s)
        self._forget_idle(visit.holder, holder)

    def _forget_idle(self, name: str, holder: _Holder) -> None:
        if holder.is_idle:
            self._holders.pop(name, None)
