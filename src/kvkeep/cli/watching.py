"""How a stack that is up is watched: what ends is restarted, where the others can do without it.

That is the daemon and the servers of tiers always, and engines where a router goes around them.
Engines on demand are started and stopped here too, for the stack belongs to one thread.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import click

from kvkeep.model.clock import Clock, SystemClock
from kvkeep.model.errors import KvkeepError, UnavailableError
from kvkeep.stack.parts import EnginePart, Restartable
from kvkeep.stack.supervisor import Stack

WATCH_S = 0.5
RESTART_DELAYS_S: Sequence[float] = (0.0, 1.0, 4.0)
"""Before each restart of a part; one that keeps dying has a cause, and the others go on without."""
STEADY_S = 300.0
"""A part that has run for so long since its restart has all of them before it again."""


def watch(stack: Stack, clock: Clock | None = None) -> NoReturn:
    """Restart what ends; give up when an engine ends that no router goes around, or all have.

    Raises:
        UnavailableError: An engine ended, and nothing can be done without it.
    """
    clock = clock or SystemClock()
    restarts = {part.title: Restarts(part, clock) for part in stack.restartable}
    while True:
        if stack.on_demand is None:
            time.sleep(WATCH_S)
        else:
            stack.on_demand.look(WATCH_S)
        ended = stack.ended()
        for part in ended:
            if part.title not in restarts and part.process is not None:
                raise UnavailableError(f"{part.title} ended: {part.process.why_failed()}")
        titles = {part.title for part in ended}
        for title, each in restarts.items():
            each.look(has_ended=title in titles)
        _require_an_engine(stack, restarts)


def _require_an_engine(stack: Stack, restarts: Mapping[str, "Restarts"]) -> None:
    """Give a stack up of which no engine is left, nor will be.

    Raises:
        UnavailableError: It is so.
    """
    engines = [each for each in restarts.values() if isinstance(each.part, EnginePart)]
    lost = [each for each in engines if each.has_given_up]
    if lost and len(lost) == len(stack.engines):
        raise UnavailableError(f"no engine is left: {lost[-1].why}")


class Restarts:
    """The few restarts that a part gets; every look is quick, for the engines are watched too."""

    def __init__(self, part: Restartable, clock: Clock) -> None:
        """Begin with a part that runs."""
        self.part, self._clock = part, clock
        self._num_begun = 0
        self._due_s: float | None = None
        """When the next restart begins; None while none is planned."""
        self._back_s = clock.now_s()
        self._is_starting = False
        self.has_given_up = False
        self.why = ""
        """Why it ended, or was not restarted, the last time."""

    def look(self, *, has_ended: bool) -> None:
        """Go on with a restart, or plan one for a part that ended."""
        if self.has_given_up:
            return
        if self._is_starting:
            self._try(self._follow)
        elif self._due_s is not None:
            if self._clock.now_s() >= self._due_s:
                self._due_s, self._num_begun = None, self._num_begun + 1
                self._try(self._begin)
        elif has_ended and self.part.process is not None:
            if self._clock.now_s() - self._back_s >= STEADY_S:
                self._num_begun = 0
            self._plan(f"it ended: {self.part.process.why_failed()}")

    def _try(self, step: Callable[[], None]) -> None:
        try:
            step()
        except (KvkeepError, OSError) as error:  # a folder that is gone costs no engine either
            self._is_starting = False
            self._plan(str(error))

    def _begin(self) -> None:
        self.part.begin_again()
        self._is_starting = True

    def _follow(self) -> None:
        if self.part.is_restarted():
            self._is_starting, self._back_s = False, self._clock.now_s()
            click.echo(f"the {self.part.title} is back", err=True)

    def _plan(self, why: str) -> None:
        self.why = why
        if self._num_begun >= len(RESTART_DELAYS_S):
            self.has_given_up = True
            click.echo(
                f"the {self.part.title} stays down, the others go on without it: {why}", err=True
            )
            return
        delay_s = RESTART_DELAYS_S[self._num_begun]
        self._due_s = self._clock.now_s() + delay_s
        when = f"in {delay_s:g} s" if delay_s else "at once"
        click.echo(f"the {self.part.title} is restarted {when}: {why}", err=True)
