"""Time that passes only when something is due: a whole cluster in one thread, in no time."""

import heapq
import itertools
from collections.abc import Callable


class VirtualTime:
    """A Clock, and the list of what happens when. Equal times keep the order of their planning."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def now_s(self) -> float:
        """Virtual seconds since the start."""
        return self._now_s

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Plan an action."""
        heapq.heappush(self._due, (self._now_s + delay_s, next(self._numbers), action))

    def run_until(self, end_s: float) -> None:
        """Let everything happen that is due by then."""
        while self._due and self._due[0][0] <= end_s:
            self._now_s, _, action = heapq.heappop(self._due)
            action()
        self._now_s = end_s
