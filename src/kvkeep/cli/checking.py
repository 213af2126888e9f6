"""Runs what ``kvkeep check`` was told to run: suites one after the other, each with its report."""

import asyncio
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from kvkeep.validate.arms import ArmsReport, Before, compare_arms, standard_arms
from kvkeep.validate.arms.closer import look_closer, means_of
from kvkeep.validate.load import Sampling
from kvkeep.validate.prompts import documents, fetch_words, load_words
from kvkeep.validate.report.form import FORM
from kvkeep.validate.report.json_file import read_json
from kvkeep.validate.report.matrix import matrix_of
from kvkeep.validate.report.outputs import write_reports
from kvkeep.validate.report.terminal import show_arms, show_matrix, show_missing, show_suite
from kvkeep.validate.runner import Progress
from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.started import Started
from kvkeep.validate.subject import Addresses, Subject, open_subject
from kvkeep.validate.suite.base import (
    UNCOUNTED,
    Context,
    Fleet,
    NotApplicable,
    NotStarted,
    Report,
    Suite,
    SuiteReport,
)
from kvkeep.validate.suite.fleets import run_on_fleets
from kvkeep.validate.suite.registry import run_suite
from kvkeep.validate.suites.determinism import fit_word_count

EXIT_FAILED = 1
Planned = Fleet | NotStarted | NotApplicable
"""What a suite starts itself, or why it does not."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one invocation does, whatever it runs against."""

    suites: tuple[Suite, ...]
    settings: CheckSettings
    exact: bool
    named: frozenset[str] = frozenset()
    """Settings that a person named."""
    arms: tuple[str, ...] = ()
    """Compare these instead of running suites."""
    num_prompts: int = 20
    """Per arm."""
    json_path: Path | None = None
    html_path: Path | None = None
    junit_path: Path | None = None
    results: Path | None = None
    resume: bool = False
    """Leave out suites that the report file has already."""
    bisects: bool = True
    """Ask what came out wrong again, in every arm."""


@dataclass(slots=True)
class _Progress:
    """Progress as one bar per phase; without a terminal, as one line per phase."""

    bars: Bars
    suite: str = ""
    _tasks: dict[str, Any] = field(default_factory=dict)

    def __call__(self, phase: str, done: int, total: int) -> None:
        name = f"{self.suite} {phase}".strip()
        if name not in self._tasks:
            self._tasks[name] = self.bars.add_task(name, total=total)
        self.bars.update(self._tasks[name], completed=done)
        if done == total and not self.bars.console.is_terminal:
            self.bars.console.print(f"{phase}: {total} answered")

    def begin(self, suite: str) -> None:
        """Forget the bars of the suite before."""
        for task in self._tasks.values():
            self.bars.remove_task(task)
        self._tasks.clear()
        self.suite = suite


@contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """Let the first signal unwind like Ctrl-C, so that what was started is stopped.

    Later ones are not heard: they would break the stopping off half-way.
    """
    heard = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # What is not to be heard, as SIGHUP under nohup, stays so.
    numbers = [number for number in heard if signal.getsignal(number) is not signal.SIG_IGN]

    def interrupt(*_: object) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Runs:
    """What one invocation has found so far, shown as it comes.

    The report file is written anew with each run, so that an interrupted job can be resumed.
    """

    def __init__(self, job: Job, console: Console) -> None:
        """Take up what an earlier invocation found, if the job says so.

        Raises:
            InputError: There is a report to resume, and it can't be read.
        """
        self._job, self.console = job, console
        self._runs = _earlier(job)
        self._logs: dict[str, list[str]] = {}

    def is_done(self, suite: str, mode: str | None = None) -> bool:
        """Whether there is a run of a suite; in one mode, where one is named."""
        return any(
            run.get("suite") == suite and mode in (None, run.get("mode")) for run in self._runs
        )

    def note(
        self,
        reports: Sequence[Report | ArmsReport],
        took_s: float = 0.0,
        last_lines: Mapping[str, Sequence[str]] | None = None,
        fleet: Fleet | None = None,
    ) -> None:
        """Show reports, and write down everything so far.

        Raises:
            InputError: A report file can't be written.
        """
        more = {} if fleet is None else {"fleet": fleet.to_dict()}
        for report in reports:
            _show(report, self.console)
            self._runs.append({**report.to_dict(), "took_s": round(took_s, 3), **more})
        self._logs |= {name: list(lines) for name, lines in (last_lines or {}).items()}
        values = {
            "schema": FORM,
            "passed": self.is_passed,
            "runs": self._runs,
            "logs": self._logs,
            "matrix": matrix_of(self._runs),
        }
        job = self._job
        write_reports(
            values, json_path=job.json_path, html_path=job.html_path, junit_path=job.junit_path
        )

    @property
    def is_passed(self) -> bool:
        """Whether something was shown, and nothing failed or proved nothing.

        What does not apply to the subject is no failure beside others that do.
        """
        counted = [bool(run["passed"]) for run in self._runs if run["outcome"] not in UNCOUNTED]
        return bool(counted) and all(counted)

    def close(self) -> int:
        """Show what all came to; returns the exit code."""
        if len(self._runs) > 1:
            self.console.print(_summary(self._runs), highlight=False)
        matrix = matrix_of(self._runs)
        if matrix:
            show_matrix(matrix, self.console)
        return 0 if self.is_passed else EXIT_FAILED


def _bars(console: Console) -> Bars:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Bars(*columns, TimeElapsedColumn(), console=console, transient=True)


def run_job(
    job: Job,
    addresses: Addresses,
    runs: Runs,
    *,
    restart: Before | None = None,
    last_lines: Callable[[], Mapping[str, Sequence[str]]] = dict,
) -> None:
    """Run a job's suites on one stack, those left out that are done already.

    Args:
        job: What to do.
        addresses: The stack under test.
        runs: Told of every report.
        restart: Restarts the engine under test; None where that is not possible.
        last_lines: Gives the end of each process's log, for the report file.

    Raises:
        InputError: The subject can't be checked, or the report not be written.
        UnavailableError: Something that judges needed broke off.
    """
    with _bars(runs.console) as bars:
        asyncio.run(_run(job, addresses, _Progress(bars), runs, restart, last_lines))


def run_fleets(job: Job, suite: Suite, planned: Sequence[Planned], runs: Runs) -> None:
    """Run a suite on fleets of its own, those left out that are done already.

    Args:
        job: What to do.
        suite: Starts its fleets itself.
        planned: What it starts, and what it leaves out.
        runs: Told of every report.

    Raises:
        InputError: The report can't be written.
    """
    words = _words(job.settings)

    def check(fleet: Fleet, ready: Started) -> Sequence[Report]:
        with _bars(runs.console) as bars:
            progress = _Progress(bars, f"{suite.name} {fleet.mode}")
            return asyncio.run(_run_on(job, suite, fleet, ready.addresses, words, progress))

    fleets = [each for each in planned if isinstance(each, Fleet)]
    runs.note([each for each in planned if not isinstance(each, Fleet)])
    left = [fleet for fleet in fleets if not runs.is_done(suite.name, fleet.mode)]
    spent_s = 0.0
    for i, ran in enumerate(run_on_fleets(suite.name, left, check, quiet=runs.console.quiet)):
        logs = {f"{ran.fleet.mode}: {name}": lines for name, lines in ran.last_lines.items()}
        runs.note(ran.reports, ran.took_s, logs, ran.fleet)
        spent_s += ran.took_s
        num_left = len(left) - i - 1
        if num_left:
            rest_s = num_left * spent_s / (i + 1)
            runs.console.print(f"{suite.name}: {num_left} left, about {rest_s / 60:.0f} min")


async def _run_on(
    job: Job,
    suite: Suite,
    fleet: Fleet,
    addresses: Addresses,
    words: Sequence[str],
    progress: Progress,
) -> Sequence[Report]:
    async with _opened(job, addresses) as subject:
        context = replace(_context(job, subject, words, progress), fleet=fleet)
        reports = await run_suite(suite, context)
        if job.bisects:
            await look_closer(reports, context, None)
        return reports


def _opened(job: Job, addresses: Addresses) -> AbstractAsyncContextManager[Subject]:
    return open_subject(
        addresses,
        timeout_s=job.settings.http_timeout_s,
        exact=job.exact,
        settings=job.settings,
    )


def _words(settings: CheckSettings) -> Sequence[str]:
    url = settings.shakespeare_url
    return load_words() if url is None else fetch_words(url)


def _context(job: Job, subject: Subject, words: Sequence[str], progress: Progress) -> Context:
    return Context(
        subject,
        job.settings,
        words,
        new_run_id=lambda: f"check-{secrets.token_hex(6)}",
        exact=job.exact,
        named=job.named,
        results=job.results,
        progress=progress,
    )


def _earlier(job: Job) -> list[dict[str, Any]]:
    """Runs that the report file has of this job's suites, if it is to be resumed."""
    if not job.resume or job.json_path is None or not job.json_path.exists():
        return []
    found = [run for run in read_json(job.json_path).get("runs") or [] if isinstance(run, dict)]
    shared = {suite.name for suite in job.suites if suite.fleets is None}
    own = {suite.name for suite in job.suites} - shared
    # What a fleet was not started for is told anew: it costs nothing, and may have changed.
    return [
        run
        for run in found
        if run.get("suite") in shared
        or (run.get("suite") in own and run.get("outcome") not in UNCOUNTED)
    ]


def _summary(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        f"  {run['suite']} {run.get('mode', '')}: {run['outcome']}, {run.get('took_s', 0.0):.0f} s"
        for run in runs
    ]
    return "\n".join(["", "All suites:", *rows])


def _show(report: Report | ArmsReport, console: Console) -> None:
    match report:
        case ArmsReport():
            show_arms(report, console)
        case NotApplicable() | NotStarted():
            show_missing(report, console)
        case SuiteReport():
            show_suite(report, console)
        case _:
            console.print(f"{report.outcome}")


async def _run(
    job: Job,
    addresses: Addresses,
    progress: _Progress,
    runs: Runs,
    restart: Before | None,
    last_lines: Callable[[], Mapping[str, Sequence[str]]],
) -> None:
    words = _words(job.settings)
    async with _opened(job, addresses) as subject:
        context = _context(job, subject, words, progress)
        if job.arms:
            runs.note(await _run_arms(job, context, restart), 0.0, last_lines())
            return
        left = [suite for suite in job.suites if not runs.is_done(suite.name)]
        spent_s = planned_s = 0.0
        for i, suite in enumerate(left):
            if len(left) > 1:
                rate = spent_s / planned_s if planned_s else 1.0
                rest_s = rate * sum(each.small_s for each in left[i:])
                progress.bars.console.print(
                    f"{suite.name}: {i + 1} of {len(left)}, about {rest_s / 60:.0f} min left"
                )
            progress.begin(suite.name if len(left) > 1 else "")
            began_s = time.perf_counter()
            reports = await run_suite(suite, context)
            if job.bisects:
                await look_closer(reports, context, restart)
            took_s = time.perf_counter() - began_s
            spent_s, planned_s = spent_s + took_s, planned_s + suite.small_s
            runs.note(reports, took_s, last_lines())


async def _run_arms(job: Job, context: Context, restart: Before | None) -> list[ArmsReport]:
    subject, settings = context.subject, context.settings
    word_count = fit_word_count(
        settings, subject.capabilities.block_tokens, fixed="word_count" in context.named
    )
    made = documents(job.num_prompts, word_count, settings.seed, words=context.words)
    reports = []
    for max_tokens in settings.max_tokens:
        arms = standard_arms(job.arms, means_of(context, restart), run_id=context.new_run_id())
        reports.append(
            await compare_arms(
                arms,
                [document.prompt() for document in made],
                Sampling(max_tokens, settings.seed),
                block_tokens=subject.capabilities.block_tokens,
                exact=job.exact,
                progress=context.progress,
            )
        )
    return reports
