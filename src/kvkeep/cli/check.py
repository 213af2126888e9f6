"""``kvkeep check``: prove on a stack that reused KV gives the answer recomputation would give."""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from kvkeep.cli.checking import (
    EXIT_FAILED,
    Job,
    Runs,
    run_fleets,
    run_job,
    terminated_as_interrupt,
)
from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.stack.machine import has_gpu
from kvkeep.stack.spec import StackSpec
from kvkeep.validate.settings import PROFILES, CheckSettings, Document, names_set, resolve
from kvkeep.validate.started import (
    by_stack,
    own_spec,
    own_template,
    spec_from_file,
    started,
    template_from_file,
)
from kvkeep.validate.subject import Addresses
from kvkeep.validate.suite.base import GROUPS, Suite, Template
from kvkeep.validate.suite.registry import find, suites
from kvkeep.validate.suite.results import results_folder

ARM_PROMPTS = 20
EXIT_INPUT = 2
LATER: dict[str, str] = {
    "report": "kvkeep.cli.check_report:report",
    "diff": "kvkeep.cli.check_diff:diff",
    "self-test": "kvkeep.cli.check_self_test:self_test",
}
"""Commands in files of their own, as ``module:function``, imported when they are called."""

REPORTS = {
    "json": "Report file.",
    "html": "The report as one page.",
    "junit": "The report as a CI reads it.",
}
"""Forms of a report, each with an option for its file."""

GENERAL = (
    "scale",
    "model_id",
    "server_port",
    "server_start_timeout_s",
    "cpu_blocks",
    "max_tokens",
    "seed",
    "http_timeout_s",
    "shakespeare_url",
    "subject",
    "reset",
    "external_counters",
    "external_metrics",
    "external_counter_tokens",
    "block_tokens",
)
"""Settings that every suite's command takes; the others are taken by those that hear of them."""
ADDRESSES = {
    "url": ("engine", "Address of an engine that runs already."),
    "daemon_metrics": ("daemon", "Address of the daemon's metrics, for tier counters."),
    "other_url": ("other", "Address of a second engine on the same cache."),
    "small_url": ("small", "Address of an engine with few blocks: adds the eviction case."),
    "baseline_url": ("baseline", "Address of an engine of the same model without a cache."),
    "router_url": ("router", "Address of a router before the engines."),
    "router_admin": ("router_admin", "Address of the router's workers and explanations."),
    "prefill_url": ("prefill", "Address of an engine that only prefills; may be repeated."),
    "decode_url": ("decode", "Address of an engine that only decodes; may be repeated."),
    "sequences_url": ("sequences", "Listener for named sequences' K/V; may be repeated."),
}
"""Option and meaning of every part of a stack that runs already."""


class CheckGroup(click.Group):
    """The commands of this file, those of `LATER`, and one for every suite and group."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every name but the aliases."""
        names = [*GROUPS, *(suite.name for suite in suites())]
        return list(dict.fromkeys([*super().list_commands(ctx), *LATER, *names]))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """One command, imported if need be; None for a name that is none."""
        target = LATER.get(cmd_name)
        if target is not None:
            module, _, function = target.partition(":")
            command = getattr(importlib.import_module(module), function)
            assert isinstance(command, click.Command)
            return command
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        try:
            return _suite_command(cmd_name, find(cmd_name))
        except InputError:
            return None


@click.group(cls=CheckGroup)
def check() -> None:
    """Prove that a stack's reused KV gives the answers that recomputation gives."""


@check.command("list")
def list_suites() -> None:
    """Explain every suite: what it needs, and what it proves."""
    console = Console()
    for suite in suites():
        needs = "; ".join(need.name for need in suite.needs) or "an engine"
        names = f" (also {', '.join(suite.aliases)})" if suite.aliases else ""
        console.print(f"[bold]{suite.name}[/]{names}", highlight=False)
        console.print(f"  {suite.title}", highlight=False)
        console.print(f"  proves: {suite.proves}", highlight=False)
        console.print(f"  needs: {needs}", highlight=False)
        console.print(f"  groups: {', '.join((*suite.groups, 'all'))}", highlight=False)
    for name, about in GROUPS.items():
        console.print(f"[bold]{name}[/]: {about}", highlight=False)


def _suite_command(name: str, chosen: Sequence[Suite]) -> click.Command:
    """The command of a suite, or of several."""
    names = _settings_of(chosen)

    def call(**given: Any) -> None:
        sys.exit(_guarded(chosen, names, given))

    about = chosen[0].title if len(chosen) == 1 else f"Run the suites about {GROUPS[name]}."
    return click.Command(
        name,
        params=[*_own_options(name), *_settings_options(names)],
        callback=call,
        help=f"{about}\n\n{_PROMISE}",
        short_help=about,
    )


def _own_options(name: str) -> list[click.Parameter]:
    """What is checked, and what becomes of the report."""
    options: list[click.Parameter] = [
        click.Option(
            ["--stack"],
            type=click.Path(path_type=Path),
            help="Stack file to start and check.",
        )
    ]
    for option, (part, text) in ADDRESSES.items():
        repeated = part in ("prefill", "decode", "sequences")
        options.append(click.Option([_flag(option)], help=text, multiple=repeated))
    options.append(
        click.Option(["--exact/--no-exact"], default=None, help="Any difference is corruption.")
    )
    if name == "determinism":
        options += _arm_options()
    options += [
        click.Option(
            ["--profile"],
            type=click.Choice(sorted(PROFILES)),
            default="local",
            show_default=True,
            help="Where values that nobody named come from.",
        ),
        *(
            click.Option([f"--{form}", f"{form}_path"], type=click.Path(path_type=Path), help=text)
            for form, text in REPORTS.items()
        ),
        click.Option(
            ["--bisect/--no-bisect"],
            default=True,
            show_default=True,
            help="Ask what came out wrong again, to find the first wrong way to its KV.",
        ),
        click.Option(["--resume"], is_flag=True, help="Leave out what the report file has."),
        click.Option(["--quiet"], is_flag=True, help="Show neither progress nor tables."),
    ]
    return options


def _settings_options(names: Sequence[str]) -> list[click.Parameter]:
    metadata = {f.name: f.metadata for f in fields(CheckSettings)}
    options: list[click.Parameter] = []
    for each in names:
        is_switch = isinstance(getattr(CheckSettings(), each), bool)
        text = metadata[each]["help"]
        options.append(click.Option([_flag(each)], is_flag=is_switch, default=None, help=text))
    return options


_PROMISE = "Exit code 0 only if it passed, 1 if it failed or proved nothing, 2 for bad input."


def _arm_options() -> list[click.Parameter]:
    return [
        click.Option(["--arms"], help="Compare these arms instead, such as cold,cached,reset."),
        click.Option(
            ["--num-prompts", "arm_prompts"],
            type=int,
            default=ARM_PROMPTS,
            show_default=True,
            help="Prompts per arm.",
        ),
    ]


def _settings_of(chosen: Sequence[Suite]) -> list[str]:
    """Settings that these suites' command takes, in the order of their class."""
    documents = {suite.document for suite in chosen}
    more = {name for suite in chosen for name in suite.settings}
    return [
        f.name
        for f in fields(CheckSettings)
        if f.name in GENERAL or f.name in more or documents & f.metadata["env"].keys()
    ]


def _flag(name: str) -> str:
    return "--" + name.removesuffix("_s").replace("_", "-")


def _guarded(chosen: Sequence[Suite], names: Sequence[str], given: dict[str, Any]) -> int:
    """Check, and turn what goes wrong into a sentence and an exit code."""
    # A switch that was not given says nothing.
    flags = {name: given.pop(name.removesuffix("_s")) or None for name in names}
    console = Console(quiet=given["quiet"])
    try:
        return _check(chosen, console, flags, given)
    except InputError as error:
        click.echo(f"kvkeep check: {error}", err=True)
        return EXIT_INPUT
    except UnavailableError as error:
        click.echo(f"kvkeep check: failed: {error}", err=True)
        return EXIT_FAILED


def _check(
    chosen: Sequence[Suite],
    console: Console,
    flags: Mapping[str, Any],
    given: Mapping[str, Any],
) -> int:
    """Settle what to check, check it, and report; returns the exit code."""
    stack, url, exact = given["stack"], given["url"], given["exact"]
    if stack is not None and url is not None:
        raise InputError("Give either --stack or --url, not both.")
    documents = tuple(dict.fromkeys(suite.document for suite in chosen))
    said: dict[str, Any] = {"exact": exact, "environ": os.environ, "documents": documents}
    spec = spec_from_file(stack, flags, **said) if stack is not None else None
    settings = resolve(
        flags,
        os.environ,
        spec.check if spec else None,
        given["profile"],
        documents=documents,
        scale="full" if has_gpu() else "small",
    )
    job = _make_job(
        chosen,
        settings,
        given,
        exact=bool(spec.exact if spec else exact),
        named=names_set(flags, os.environ, spec.check if spec else None, documents),
    )
    runs = Runs(job, console)
    if url is not None:
        run_job(job, _addresses(given, settings), runs)
        return runs.close()
    stray = [name for name in ADDRESSES if given[name] and name != "url"]
    if stray:
        raise InputError(f"{_flag(stray[0])} goes with --url; a stack file says it.")
    with terminated_as_interrupt():
        _run_on_shared(job, spec, runs)
        for suite in chosen:
            if suite.fleets is not None:
                template: Template = (
                    template_from_file(stack, flags, **said)
                    if stack is not None
                    else own_template(settings, os.environ, exact=job.exact, suites=(suite,))
                )
                run_fleets(job, suite, suite.fleets(template, settings), runs)
    return runs.close()


def _run_on_shared(job: Job, spec: StackSpec | None, runs: Runs) -> None:
    """Start one stack for the suites that share it, and run them.

    Without a stack file it is several, one after the other: see `by_stack`. All is down again
    before others start fleets of their own.
    """
    shared = tuple(suite for suite in job.suites if suite.fleets is None)
    for suites_of_one in by_stack(shared) if spec is None else [shared]:
        if job.arms or any(not runs.is_done(suite.name) for suite in suites_of_one):
            _run_on_one(job, spec, suites_of_one, runs)


def _run_on_one(job: Job, spec: StackSpec | None, shared: tuple[Suite, ...], runs: Runs) -> None:
    spec = spec or own_spec(job.settings, os.environ, exact=job.exact, suites=shared)
    with_router = any(suite.needs_router for suite in shared)
    with started(spec, quiet=runs.console.quiet, with_router=with_router) as ready:
        run_job(
            replace(job, suites=shared),
            ready.addresses,
            runs,
            restart=ready.restart,
            last_lines=ready.last_lines,
        )


def _make_job(
    chosen: Sequence[Suite],
    settings: CheckSettings,
    given: Mapping[str, Any],
    *,
    exact: bool,
    named: frozenset[str],
) -> Job:
    num_prompts = given.get("arm_prompts", ARM_PROMPTS)
    if num_prompts < 1:
        raise InputError(f"Give --num-prompts of at least 1, not {num_prompts}.")
    if given["resume"] and given["json_path"] is None:
        raise InputError("--resume needs the report file to go on from: name it with --json.")
    writes = any(suite.document is Document.MULTI_PROCESS for suite in chosen)
    return Job(
        suites=tuple(chosen),
        settings=settings,
        exact=exact,
        # The documents' own sizes are kept, too.
        named=named if given["profile"] == "local" else named | {"word_count"},
        arms=tuple(part.strip() for part in (given.get("arms") or "").split(",") if part.strip()),
        num_prompts=num_prompts,
        **{f"{form}_path": given[f"{form}_path"] for form in REPORTS},
        results=results_folder(settings) if writes else None,
        resume=given["resume"],
        bisects=given["bisect"],
    )


def _addresses(given: Mapping[str, Any], settings: CheckSettings) -> Addresses:
    parts = {part: given[option] for option, (part, _) in ADDRESSES.items()}
    return Addresses(**parts, model=settings.model_id)
