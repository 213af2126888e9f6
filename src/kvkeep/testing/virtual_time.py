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
        while self.step(end_s):
            pass
        self._now_s = end_s

    def step(self, end_s: float) -> bool:
        """Let the next thing happen if it is due by then; returns whether there was one."""
        if not self._due or self._due[0][0] > end_s:
            return False
        self._now_s, _, action = heapq.heappop(self._due)
        action()
        return True


class PausableTime:
    """The time of one process, which may be frozen: what is due then happens when it goes on."""

    def __init__(self, time: VirtualTime) -> None:
        """Run."""
        self._time = time
        self._late: list[Callable[[], None]] = []
        self.is_frozen = False

    def now_s(self) -> float:
        """Virtual seconds since the start."""
        return self._time.now_s()

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Plan an action."""
        self._time.after(delay_s, lambda: self._due(action))

    def _due(self, action: Callable[[], None]) -> None:
        if self.is_frozen:
            self._late.append(action)
        else:
            action()

    def thaw(self) -> None:
        """Go on, with what should have happened meanwhile first."""
        self.is_frozen = False
        late, self._late = self._late, []
        for action in late:
            self._due(action)
