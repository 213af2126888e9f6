"""Whether a tier answers at all, judged by the calls that are under way.

A call's deadline has to allow for the slowest good answer, so a server that stands still is found
out late by it, and everyone who asks meanwhile waits in vain. Here a call speaks against its tier
as soon as it takes far longer than such calls did.
"""

PATIENCE_S = 1.0
"""Below this no call speaks against its tier: a busy machine alone may take that long ..."""
PATIENCE_S_MAX = 3.0
"""... and above this a question always does."""
PATIENCE_FACTOR = 10.0
"""In between: this many times what a question took so far."""
NEWEST_SHARE = 0.2
"""Of the average, for the question answered last."""


class Pulse:
    """Pure, and not thread-safe."""

    def __init__(self, deadline_s: float, *, latches: bool) -> None:
        """Think well of the tier.

        Args:
            deadline_s: A call older than that is its breaker's business.
            latches: Think ill of it from the first call that takes too long until one goes well;
                for a tier that somebody asks to find that out. Else only while such a call lasts.
        """
        self.is_lost = False
        """It was thought ill of, and no call has gone well since."""
        self._deadline_s = deadline_s
        self._latches = latches
        self._typical_s = 0.0
        self._running: dict[int, tuple[float, float]] = {}
        """When each call began, and how long it may take."""
        self._next_ticket = 0

    @property
    def question_s(self) -> float:
        """How long a question may take."""
        return min(max(PATIENCE_S, PATIENCE_FACTOR * self._typical_s), PATIENCE_S_MAX)

    def begin(self, now_s: float, patience_s: float | None = None) -> int:
        """A call begins; returns its ticket.

        Args:
            now_s: Monotonic time.
            patience_s: How long it may take; None for a question.
        """
        self._next_ticket += 1
        limit_s = self.question_s if patience_s is None else patience_s
        self._running[self._next_ticket] = now_s, limit_s
        return self._next_ticket

    def end(self, ticket: int, now_s: float, *, is_good: bool, is_question: bool) -> None:
        """It has ended, with an answer or an error."""
        begun_s, limit_s = self._running.pop(ticket)
        if is_good and is_question:
            taken_s = min(now_s - begun_s, 2 * limit_s)
            self._typical_s += NEWEST_SHARE * (taken_s - self._typical_s)
        if is_good:
            self.is_lost = False
        elif now_s - begun_s > limit_s:
            self.is_lost = self._latches

    def look(self, now_s: float) -> bool:
        """Notice calls that take too long; True if the tier is thought ill of only since now."""
        was_lost = self.is_lost
        self.is_lost |= self._latches and self._is_waited_for(now_s)
        return self.is_lost and not was_lost

    def is_still(self, now_s: float) -> bool:
        """Whether nobody should wait for this tier."""
        return self.is_lost or self._is_waited_for(now_s)

    def _is_waited_for(self, now_s: float) -> bool:
        return any(
            limit_s < now_s - begun_s <= self._deadline_s
            for begun_s, limit_s in self._running.values()
        )
