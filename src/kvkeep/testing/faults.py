"""Faults with names, struck by a seed: processes that freeze and die, links that lose and delay."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from random import Random

from kvkeep.testing.virtual_time import VirtualTime

STALL_S = 0.5
"""Within which a process that goes on has caught up."""


class Fault(Enum):
    """What can go wrong; the value is its name in logs and in docs/failure-modes.md."""

    ENGINE_FREEZE = "engine freeze"
    ENGINE_DEATH = "engine death"
    DAEMON_FREEZE = "daemon freeze"
    DAEMON_DEATH = "daemon death"
    LINK_CUT = "link cut"
    LINK_DELAY = "link delay"
    ROT = "rot"
    CLEAR = "clear"
    """Not a fault of anyone: a person clears the pool at a bad moment."""


@dataclass(frozen=True)
class FaultPlan:
    """How often each fault strikes, and until when."""

    per_minute: Mapping[Fault, float] = field(
        default_factory=lambda: {
            Fault.ENGINE_FREEZE: 20.0,
            Fault.ENGINE_DEATH: 4.0,
            Fault.DAEMON_FREEZE: 4.0,
            Fault.DAEMON_DEATH: 4.0,
            Fault.LINK_CUT: 6.0,
            Fault.LINK_DELAY: 20.0,
            Fault.ROT: 6.0,
            Fault.CLEAR: 3.0,
        }
    )
    """Mean number of strikes in a minute of virtual time; 0 is never."""
    until_s: float = 25.0
    """Virtual time after which nothing goes wrong any more."""

    def plan(self, time: VirtualTime, chance: Random, strike: Callable[[Fault], None]) -> None:
        """Have ``strike`` called at random times until ``until_s``."""
        for fault, per_minute in self.per_minute.items():
            at_s = 0.0
            while per_minute and (at_s := at_s + chance.expovariate(per_minute / 60)) < (
                self.until_s
            ):
                time.after(at_s, lambda fault=fault: strike(fault))  # type: ignore[misc]


class Process:
    """Something that runs, may stand still for a while, and may be killed.

    Steps that come due while it stands still are taken soon after it goes on, in any order, as a
    program finds all its sockets readable at once. After its death no step is taken.
    """

    def __init__(self, pid: int, time: VirtualTime, chance: Random) -> None:
        self.pid = pid
        self.is_alive = True
        self._time = time
        self._chance = chance
        self._frozen_until_s = 0.0
        self._died: list[Callable[[], None]] = []

    def after(self, delay_s: float, step: Callable[[], None]) -> None:
        """Plan a step of this process."""
        self._time.after(delay_s, lambda: self._take(step))

    def _take(self, step: Callable[[], None]) -> None:
        left_s = self._frozen_until_s - self._time.now_s()
        if not self.is_alive:
            return
        if left_s > 0:
            self.after(left_s + self._chance.uniform(0.0, STALL_S), step)
        else:
            step()

    def freeze(self, seconds: float) -> None:
        """Stand still, in the middle of whatever it does."""
        self._frozen_until_s = max(self._frozen_until_s, self._time.now_s() + seconds)

    def kill(self) -> None:
        """Be gone; whoever waits for that is told."""
        self.is_alive = False
        for told in self._died:
            told()
        self._died.clear()

    def when_dead(self, told: Callable[[], None]) -> None:
        """Call ``told`` at its death; at once if it is dead."""
        if self.is_alive:
            self._died.append(told)
        else:
            told()


class FaultyLink:
    """A stream between two processes: in order, late at times, and cut for good at any moment.

    What is under way when the link is cut is lost. Each end learns of the cut by itself, after it
    has read what had arrived before. Nothing is said about the order between two links.
    """

    def __init__(self, time: VirtualTime, chance: Random, ends: tuple[Process, Process]) -> None:
        self._time = time
        self._chance = chance
        self._ends = ends
        self._last_arrival_s = [0.0, 0.0]
        self._arrived: tuple[deque[Callable[[], None]], ...] = (deque(), deque())
        self._lost: list[tuple[int, Callable[[], None]]] = []
        self.is_cut = False
        self.extra_delay_s = 0.0
        """What the next message takes longer than usual."""

    def send(self, to: int, arrive: Callable[[], None]) -> None:
        """Have ``arrive`` called as a step of end ``to``, 0 or 1, unless the link is cut first."""
        delay_s, self.extra_delay_s = self._chance.uniform(1e-4, 2e-3) + self.extra_delay_s, 0.0
        at_s = max(self._last_arrival_s[to], self._time.now_s() + delay_s)
        self._last_arrival_s[to] = at_s
        self._time.after(at_s - self._time.now_s(), lambda: self._deliver(to, arrive))

    def _deliver(self, to: int, arrive: Callable[[], None]) -> None:
        if not self.is_cut:
            self._put(to, arrive)

    def _put(self, to: int, arrive: Callable[[], None]) -> None:
        # The steps of a process may change places; what they take from here keeps its order.
        self._arrived[to].append(arrive)
        self._ends[to].after(0.0, lambda: self._read(to))

    def _read(self, to: int) -> None:
        self._arrived[to].popleft()()

    def when_lost(self, end: int, lost: Callable[[], None]) -> None:
        """Have ``lost`` called as a step of this end once the link is cut."""
        self._lost.append((end, lost))

    def cut(self) -> None:
        """Lose the link for good."""
        if self.is_cut:
            return
        self.is_cut = True
        for end, lost in self._lost:
            delay_s = self._chance.uniform(0.0, 0.05)
            self._time.after(delay_s, lambda end=end, lost=lost: self._put(end, lost))  # type: ignore[misc]
