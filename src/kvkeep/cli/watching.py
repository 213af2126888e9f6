"""How a stack that is up is watched: a daemon or a tier's server is restarted, an engine is not."""

import time
from collections.abc import Callable, Sequence
from typing import NoReturn

import click

from kvkeep.model.clock import Clock, SystemClock
from kvkeep.model.errors import KvkeepError, UnavailableError
from kvkeep.stack.parts import Restartable
from kvkeep.stack.supervisor import Stack

WATCH_S = 0.5
RESTART_DELAYS_S: Sequence[float] = (0.0, 1.0, 4.0)
"""Before each restart of a part; one that keeps dying has a cause, and engines go on without."""


def watch(stack: Stack, clock: Clock | None = None) -> NoReturn:
    """Restart a daemon or a server that ends; give up when an engine ends.

    Raises:
        UnavailableError: An engine ended.
    """
    clock = clock or SystemClock()
    parts: list[Restartable] = [*stack.servers, *([stack.daemon] if stack.has_daemon else [])]
    restarts = {part.name: Restarts(part, clock) for part in parts}
    while True:
        time.sleep(WATCH_S)
        ended = stack.ended()
        for part in ended:
            if part.name not in restarts and part.process is not None:
                raise UnavailableError(f"{part.title} ended: {part.process.why_failed()}")
        names = {part.name for part in ended}
        for name, each in restarts.items():
            each.look(has_ended=name in names)


class Restarts:
    """The few restarts that a part gets; every look is quick, for the engines are watched too."""

    def __init__(self, part: Restartable, clock: Clock) -> None:
        """Begin with a part that runs."""
        self._part, self._clock = part, clock
        self._num_begun = 0
        self._due_s: float | None = None
        """When the next restart begins; None while none is planned."""
        self._is_starting = False
        self._has_given_up = False

    def look(self, *, has_ended: bool) -> None:
        """Go on with a restart, or plan one for a part that ended."""
        if self._has_given_up:
            return
        if self._is_starting:
            self._try(self._follow)
        elif self._due_s is not None:
            if self._clock.now_s() >= self._due_s:
                self._due_s, self._num_begun = None, self._num_begun + 1
                self._try(self._begin)
        elif has_ended:
            self._plan(f"it ended: {self._part.process.why_failed()}")

    def _try(self, step: Callable[[], None]) -> None:
        try:
            step()
        except (KvkeepError, OSError) as error:  # a folder that is gone costs no engine either
            self._is_starting = False
            self._plan(str(error))

    def _begin(self) -> None:
        self._part.begin_again()
        self._is_starting = True

    def _follow(self) -> None:
        if self._part.is_restarted():
            self._is_starting = False
            click.echo(f"the {self._part.title} is back", err=True)

    def _plan(self, why: str) -> None:
        if self._num_begun >= len(RESTART_DELAYS_S):
            self._has_given_up = True
            click.echo(
                f"the {self._part.title} stays down, engines go on without it: {why}", err=True
            )
            return
        delay_s = RESTART_DELAYS_S[self._num_begun]
        self._due_s = self._clock.now_s() + delay_s
        when = f"in {delay_s:g} s" if delay_s else "at once"
        click.echo(f"the {self._part.title} is restarted {when}: {why}", err=True)
