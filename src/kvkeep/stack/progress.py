"""What a person sees while something takes long: live bars on a terminal, plain lines elsewhere.

Everything goes to stderr, so that stdout stays free for results. One thread may use an object.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from kvkeep.model.clock import Clock, SystemClock


class Task:
    """One thing that takes long, with what it does now and how far it is."""

    def __init__(self, title: str, bars: Bars | None, *, quiet: bool, steps: int | None) -> None:
        self._title, self._bars, self._quiet = title, bars, quiet
        self._doing = ""
        self._is_finished = False
        self._task: TaskID | None = None
        if bars is not None:
            self._task = bars.add_task(title, total=steps, doing="")

    def say(self, doing: str, *, steps_done: int | None = None) -> bool:
        """Show what is being done now; a line is printed only when the text changes.

        Returns:
            Whether the text changed.
        """
        has_changed, self._doing = doing != self._doing, doing
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, doing=doing, completed=steps_done)
        elif has_changed and not self._quiet:
            print(f"{self._title}: {doing}", file=sys.stderr, flush=True)
        return has_changed

    @property
    def has_begun(self) -> bool:
        """Whether it has said what it does."""
        return self._doing != ""

    def finish(self, outcome: str) -> None:
        """Show the end of it; only the first call counts."""
        if self._is_finished:
            return
        self._is_finished = True
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, total=1, completed=1)
        self.say(outcome)


class Progress:
    """Shows tasks while it is entered; a context manager."""

    def __init__(
        self, *, quiet: bool = False, console: Console | None = None, clock: Clock | None = None
    ) -> None:
        """Choose the form: nothing if ``quiet``, bars on a terminal, else lines."""
        self._quiet = quiet
        self._console = console or Console(stderr=True)
        self._clock = clock or SystemClock()
        self._bars: Bars | None = None
        self._entered = 0

    def __enter__(self) -> Self:
        self._entered += 1
        if self._entered == 1 and not self._quiet and self._console.is_terminal:
            self._bars = Bars(
                SpinnerColumn(finished_text="[green]✓"),
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=20),
                TimeElapsedColumn(),
                TextColumn("{task.fields[doing]}"),
                console=self._console,
            )
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered -= 1
        if self._entered == 0 and self._bars is not None:
            self._bars.stop()
            self._bars = None

    @contextmanager
    def task(self, title: str, *, steps: int | None = None) -> Iterator[Task]:
        """Show one task until the block ends; its elapsed time is added to the last line.

        Args:
            title: Who is doing something, such as ``engine a``.
            steps: How many steps it has, or None where nobody can know.
        """
        begun_s = self._clock.now_s()
        with self:
            task = Task(title, self._bars, quiet=self._quiet, steps=steps)
            try:
                yield task
            except BaseException:
                # What never began to do something did not stop either; the error says the rest.
                task.finish("stopped" if task.has_begun else "")
                raise
            task.finish(f"done in {self._clock.now_s() - begun_s:.1f} s")
