"""Runs what ``kvkeep check`` was told to run: suites one after the other, each with its report."""

import asyncio
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from kvkeep.validate.report.outputs import write_reports
from kvkeep.validate.report.terminal import show_arms, show_missing, show_suite
from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.subject import Addresses, open_subject
from kvkeep.validate.suite.base import Context, NotApplicable, Outcome, Report, Suite, SuiteReport
from kvkeep.validate.suite.registry import run_suite
from kvkeep.validate.suites.determinism import fit_word_count

EXIT_FAILED = 1


@dataclass(frozen=True, slots=True)
class Job:
    """What one invocation does, whatever it runs against."""

    suites: tuple[Suite, ...]
    settings: CheckSettings
    exact: bool
    words_fixed: bool
    """A person named the word count."""
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


def run_job(
    job: Job,
    addresses: Addresses,
    console: Console,
    *,
    restart: Before | None = None,
    last_lines: Callable[[], Mapping[str, Sequence[str]]] = dict,
) -> int:
    """Run a job, show and write its reports; returns the exit code.

    The report file is written anew after each suite, so that an interrupted job can be resumed.

    Args:
        job: What to do.
        addresses: The stack under test.
        console: Where reports are shown.
        restart: Restarts the engine under test; None where that is not possible.
        last_lines: Gives the end of each process's log, for the report file.

    Raises:
        InputError: The subject can't be checked, or the report not be written.
        UnavailableError: Something that judges needed broke off.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    runs = _earlier(job)
    verdicts = [(str(run["outcome"]), bool(run["passed"])) for run in runs]

    def note(reports: Sequence[Report | ArmsReport], took_s: float) -> None:
        for report in reports:
            _show(report, console)
            verdicts.append((report.outcome, report.passed))
            runs.append({**report.to_dict(), "took_s": round(took_s, 3)})
        values = {
            "schema": FORM,
            "passed": _passed(verdicts),
            "runs": runs,
            "logs": {name: list(lines) for name, lines in last_lines().items()},
        }
        write_reports(
            values, json_path=job.json_path, html_path=job.html_path, junit_path=job.junit_path
        )

    with Bars(*columns, TimeElapsedColumn(), console=console, transient=True) as bars:
        done = {str(run.get("suite")) for run in runs}
        asyncio.run(_run(job, addresses, _Progress(bars), note, done, restart))
    if len(verdicts) > 1:
        console.print(_summary(runs), highlight=False)
    return 0 if _passed(verdicts) else EXIT_FAILED


def _earlier(job: Job) -> list[dict[str, Any]]:
    """Runs that the report file has of this job's suites, if it is to be resumed."""
    if not job.resume or job.json_path is None or not job.json_path.exists():
        return []
    names = {suite.name for suite in job.suites}
    found = read_json(job.json_path).get("runs") or []
    return [run for run in found if isinstance(run, dict) and run.get("suite") in names]


def _passed(verdicts: Sequence[tuple[str, bool]]) -> bool:
    """Whether something was shown, and nothing failed or proved nothing.

    What does not apply to the subject is no failure beside others that do.
    """
    counted = [passed for outcome, passed in verdicts if outcome != Outcome.NOT_APPLICABLE]
    return bool(counted) and all(counted)


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
        case NotApplicable():
            show_missing(report, console)
        case SuiteReport():
            show_suite(report, console)
        case _:
            console.print(f"{report.outcome}")


async def _run(
    job: Job,
    addresses: Addresses,
    progress: _Progress,
    note: Callable[[Sequence[Report | ArmsReport], float], None],
    done: set[str],
    restart: Before | None,
) -> None:
    settings = job.settings
    url = settings.shakespeare_url
    words = load_words() if url is None else fetch_words(url)
    async with open_subject(
        addresses, timeout_s=settings.http_timeout_s, exact=job.exact, settings=settings
    ) as subject:
        context = Context(
            subject,
            settings,
            words,
            new_run_id=lambda: f"check-{secrets.token_hex(6)}",
            exact=job.exact,
            words_fixed=job.words_fixed,
            results=job.results,
            progress=progress,
        )
        if job.arms:
            note(await _run_arms(job, context, restart), 0.0)
            return
        left = [suite for suite in job.suites if suite.name not in done]
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
            note(reports, took_s)


async def _run_arms(job: Job, context: Context, restart: Before | None) -> list[ArmsReport]:
    subject, settings = context.subject, context.settings
    word_count = fit_word_count(
        settings, subject.capabilities.block_tokens, fixed=context.words_fixed
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
