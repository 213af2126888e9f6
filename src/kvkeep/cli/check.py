"""``kvkeep check``: prove on a stack that reused KV gives the answer recomputation would give."""

import asyncio
import importlib
import os
import secrets
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.validate.arms import ArmsReport, Before, compare_arms, standard_arms
from kvkeep.validate.load import Sampling
from kvkeep.validate.prompts import documents, fetch_words, load_words
from kvkeep.validate.report.json_file import write_json
from kvkeep.validate.report.terminal import show_arms, show_determinism
from kvkeep.validate.settings import PROFILES, CheckSettings, is_set, resolve
from kvkeep.validate.started import own_spec, spec_from_file, started
from kvkeep.validate.subject import Addresses, Subject, open_subject
from kvkeep.validate.suites.determinism import (
    Determinism,
    DeterminismReport,
    fit_word_count,
    make_plan,
)

SCHEMA = "kvkeep.check/1"
ARM_PROMPTS = 20
LATER: dict[str, str] = {
    "report": "kvkeep.cli.check_report:report",
}
"""Commands in files of their own, as ``module:function``, imported when they are called."""
EXIT_FAILED = 1
EXIT_INPUT = 2

_SETTINGS = (
    ("--max-tokens", "Answer lengths, separated by commas; each is one run."),
    ("--seed", "Seed of prompts and sampling."),
    ("--max-iterations", "Iterations of a phase."),
    ("--word-count", "Words of a window of the long text."),
    ("--control-interval", "Ask the control prompts every n-th iteration."),
    ("--shakespeare-interval", "Ask the next window every n-th iteration."),
    ("--random-interval", "Ask the random prompts every n-th iteration."),
    ("--http-timeout", "Longest wait for an answer's next piece, in seconds."),
    ("--shakespeare-url", "Address of the long text instead of the shipped plays."),
    ("--model-id", "Model: smollm2, a folder, or an id."),
    ("--server-port", "Port of the engine."),
    ("--server-start-timeout", "Longest wait for a stack that is started, in seconds."),
    ("--cpu-blocks", "Blocks of the host pool of a stack that is started."),
)
_IN_SECONDS = ("http_timeout", "server_start_timeout")


class CheckGroup(click.Group):
    """The commands of this file, and those of `LATER`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every name."""
        return [*super().list_commands(ctx), *LATER]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """One command, imported if need be; None for a name that is none."""
        target = LATER.get(cmd_name)
        if target is None:
            return super().get_command(ctx, cmd_name)
        module, _, function = target.partition(":")
        command = getattr(importlib.import_module(module), function)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=CheckGroup)
def check() -> None:
    """Prove that a stack's reused KV gives the answers that recomputation gives."""


def _settings_options(command: Any) -> Any:
    for name, text in reversed(_SETTINGS):
        command = click.option(name, help=text)(command)
    return command


@check.command()
@click.option("--stack", type=click.Path(path_type=Path), help="Stack file to start and check.")
@click.option("--url", help="Address of an engine that runs already.")
@click.option("--daemon-metrics", help="Address of the daemon's metrics, for tier counters.")
@click.option("--other-url", help="Address of a second engine on the same cache.")
@click.option("--small-url", help="Address of an engine with few blocks: adds the eviction case.")
@click.option("--exact/--no-exact", default=None, help="Any difference is corruption.")
@click.option("--arms", help="Compare these arms instead, such as cold,cached,reset.")
@click.option("--num-prompts", default=ARM_PROMPTS, show_default=True, help="Prompts per arm.")
@click.option(
    "--profile",
    type=click.Choice(sorted(PROFILES)),
    default="local",
    show_default=True,
    help="Where values that nobody named come from.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Report file.")
@click.option("--quiet", is_flag=True, help="Show neither progress nor tables.")
@_settings_options
def determinism(
    stack: Path | None,
    url: str | None,
    profile: str,
    json_path: Path | None,
    quiet: bool,
    **given: Any,
) -> None:
    """Ask, reset the engine's cache, ask again: every answer must be the same or a near-tie.

    Exit code 0 only if it passed, 1 if it failed or proved nothing, 2 for bad input.
    """
    flags = {
        name + ("_s" if name in _IN_SECONDS else ""): given.pop(name)
        for name in [option.removeprefix("--").replace("-", "_") for option, _ in _SETTINGS]
    }
    console = Console(quiet=quiet)
    try:
        code = _check(stack, url, profile, json_path, console, flags, given)
    except InputError as error:
        click.echo(f"kvkeep check: {error}", err=True)
        sys.exit(EXIT_INPUT)
    except UnavailableError as error:
        click.echo(f"kvkeep check: failed: {error}", err=True)
        sys.exit(EXIT_FAILED)
    sys.exit(code)


def _check(
    stack: Path | None,
    url: str | None,
    profile: str,
    json_path: Path | None,
    console: Console,
    flags: Mapping[str, Any],
    given: Mapping[str, Any],
) -> int:
    """Settle what to check, check it, and report; returns the exit code."""
    if stack is not None and url is not None:
        raise InputError("Give either --stack or --url, not both.")
    exact = given["exact"]
    spec = spec_from_file(stack, flags, exact=exact) if stack is not None else None
    settings = resolve(flags, os.environ, spec.check if spec else None, profile)
    job = Job(
        settings=settings,
        exact=bool(spec.exact if spec else exact),
        arms=_names(given["arms"]),
        num_prompts=given["num_prompts"],
        words_fixed=profile != "local" or is_set("word_count", flags, os.environ),
    )
    if url is not None:
        addresses = Addresses(
            url, given["daemon_metrics"], given["other_url"], given["small_url"], settings.model_id
        )
        return run_job(job, addresses, console, json_path)
    stray = [name for name in ("daemon_metrics", "other_url", "small_url") if given[name]]
    if stray:
        raise InputError(f"--{stray[0].replace('_', '-')} goes with --url; a stack file says it.")
    spec = spec or own_spec(settings, os.environ, exact=job.exact)
    with _terminated_as_interrupt(), started(spec, quiet=console.quiet) as ready:
        return run_job(job, ready.addresses, console, json_path, restart=ready.restart)


@contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C, so that what was started is stopped."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Job:
    """What one invocation does, whatever it runs against."""

    def __init__(
        self,
        *,
        settings: CheckSettings,
        exact: bool,
        arms: Sequence[str],
        num_prompts: int,
        words_fixed: bool,
    ) -> None:
        """Check what can be checked without a server.

        Raises:
            InputError: The text can't be read.
        """
        if num_prompts < 1:
            raise InputError(f"Give --num-prompts of at least 1, not {num_prompts}.")
        self.settings, self.exact, self.arms = settings, exact, arms
        self.num_prompts, self.words_fixed = num_prompts, words_fixed
        text_url = settings.shakespeare_url
        self.words = load_words() if text_url is None else fetch_words(text_url)

    async def run(
        self, addresses: Addresses, bars: Bars, *, restart: Before | None = None
    ) -> list[DeterminismReport | ArmsReport]:
        """Run everything once per answer length."""
        timeout_s = self.settings.http_timeout_s
        reports: list[DeterminismReport | ArmsReport] = []
        async with open_subject(addresses, timeout_s=timeout_s, exact=self.exact) as subject:
            for max_tokens in self.settings.max_tokens:
                sampling = Sampling(max_tokens, self.settings.seed)
                if self.arms:
                    reports.append(await self._run_arms(subject, sampling, bars, restart))
                else:
                    reports.append(await self._run_suite(subject, sampling, bars))
        return reports

    def _word_count(self, subject: Subject) -> int:
        block_tokens = subject.capabilities.block_tokens
        return fit_word_count(self.settings, block_tokens, fixed=self.words_fixed)

    async def _run_suite(
        self, subject: Subject, sampling: Sampling, bars: Bars
    ) -> DeterminismReport:
        plan = make_plan(self.settings, self.words, self._word_count(subject))
        run = Determinism(
            subject,
            self.settings,
            plan,
            sampling,
            exact=self.exact,
            run_id=_new_run_id(),
            progress=_Shown(bars),
        )
        return await run.run()

    async def _run_arms(
        self, subject: Subject, sampling: Sampling, bars: Bars, restart: Before | None
    ) -> ArmsReport:
        arms = standard_arms(
            self.arms,
            subject.engine,
            run_id=_new_run_id(),
            daemon=subject.daemon,
            other=subject.other,
            restart=restart,
        )
        made = documents(
            self.num_prompts, self._word_count(subject), self.settings.seed, words=self.words
        )
        return await compare_arms(
            arms,
            [document.prompt() for document in made],
            sampling,
            block_tokens=subject.capabilities.block_tokens,
            exact=self.exact,
            progress=_Shown(bars),
        )


def run_job(
    job: Job,
    addresses: Addresses,
    console: Console,
    json_path: Path | None,
    *,
    restart: Before | None = None,
) -> int:
    """Run a job, show and write its reports; returns the exit code."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Bars(*columns, TimeElapsedColumn(), console=console, transient=True) as bars:
        reports = asyncio.run(job.run(addresses, bars, restart=restart))
    for report in reports:
        if isinstance(report, ArmsReport):
            show_arms(report, console)
        else:
            show_determinism(report, console)
    passed = all(report.passed for report in reports)
    if json_path is not None:
        runs = [report.to_dict() for report in reports]
        write_json({"schema": SCHEMA, "passed": passed, "runs": runs}, json_path)
    return 0 if passed else EXIT_FAILED


class _Shown:
    """Progress as one bar per phase; without a terminal, as one line per phase."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, Any] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase, total=total)
        self._bars.update(self._tasks[phase], completed=done)
        if done == total and not self._bars.console.is_terminal:
            self._bars.console.print(f"{phase}: {total} answered")


def _names(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _new_run_id() -> str:
    return f"check-{secrets.token_hex(6)}"
