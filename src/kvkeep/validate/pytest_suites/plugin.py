"""The stack under test, from options, and a fixture that runs one suite against it.

Everything is started once for all tests of a session and stopped at its end. A suite that does not
apply to the stack is skipped with the reason; one that proved nothing fails. Wrong answers are
asked again in every arm that the stack allows. A suite that starts fleets of its own runs before
that, for it needs the machine for itself.
"""

import asyncio
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvkeep.stack.machine import has_gpu
from kvkeep.validate.arms.closer import look_closer
from kvkeep.validate.prompts import fetch_words, load_words
from kvkeep.validate.report.terminal import show_missing, show_suite
from kvkeep.validate.settings import CheckSettings, Document, names_set, resolve
from kvkeep.validate.started import (
    Started,
    own_spec,
    own_template,
    spec_from_file,
    started,
    template_from_file,
)
from kvkeep.validate.subject import Addresses, open_subject
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
from kvkeep.validate.suite.registry import find, run_suite
from kvkeep.validate.suite.results import results_folder

MARKERS = {
    "kvbm": "determinism of KV reuse",
    "e2e": "a whole stack",
    "slow": "takes a while",
    "nightly": "for runs at night",
    "fleets": "starts stacks of its own",
}
ADDRESSES = {
    "url": "an engine that runs already",
    "daemon-metrics": "the daemon's metrics",
    "baseline-url": "an engine of the same model without a cache",
    "router-url": "a router before the engines",
    "router-admin": "the router's workers and explanations",
    "prefill-url": "an engine that only prefills",
    "decode-url": "an engine that only decodes",
    "sequences-url": "a listener for named sequences' K/V",
}


@dataclass(frozen=True, slots=True)
class Checking:
    """How all suites of a session are run."""

    exact: bool
    """Any difference is corruption: the stack file says so."""
    results: Path
    """One folder for the result files of all."""
    bisects: bool
    """Ask what came out wrong again, in every arm."""
    said: Mapping[str, Any]
    """Settings of the stack file."""
    keeps_words: bool
    """Windows are as long as the documents have them."""

    def named(self, suite: Suite) -> frozenset[str]:
        """Settings that a person named to a suite."""
        found = names_set({}, os.environ, self.said, (suite.document,))
        return found | {"word_count"} if self.keeps_words else found


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say what is to be checked."""
    group = parser.getgroup("kvkeep")
    group.addoption("--kvkeep-stack", type=Path, help="stack file to start and check")
    group.addoption("--kvkeep-profile", default="local", help="local or reference")
    group.addoption("--kvkeep-scale", help="small or full")
    group.addoption(
        "--kvkeep-no-bisect", action="store_true", help="do not ask wrong answers again"
    )
    for name, text in ADDRESSES.items():
        group.addoption(f"--kvkeep-{name}", help=f"address of {text}")


def pytest_configure(config: pytest.Config) -> None:
    """Make the markers known."""
    for name, text in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {text}")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts stacks of its own goes first: the one under test is not up then."""
    items.sort(key=lambda item: item.get_closest_marker("fleets") is None)


def _settings(config: pytest.Config, documents: Sequence[Document]) -> CheckSettings:
    stack = config.getoption("--kvkeep-stack")
    return resolve(
        {"scale": config.getoption("--kvkeep-scale")},
        os.environ,
        None if stack is None else spec_from_file(stack, {}, exact=None).check,
        config.getoption("--kvkeep-profile"),
        documents=documents,
        scale="full" if has_gpu() else "small",
    )


@contextmanager
def _target(config: pytest.Config) -> Iterator[Started]:
    def given(name: str) -> str | None:
        value = config.getoption(f"--kvkeep-{name}")
        return None if value is None else str(value)

    url, stack = given("url"), config.getoption("--kvkeep-stack")
    if url is not None:
        prefill, decode, listener = (
            given("prefill-url"),
            given("decode-url"),
            given("sequences-url"),
        )
        yield Started(
            Addresses(
                url,
                given("daemon-metrics"),
                baseline=given("baseline-url"),
                router=given("router-url"),
                router_admin=given("router-admin"),
                prefill=(prefill,) if prefill else (),
                decode=(decode,) if decode else (),
                sequences=(listener,) if listener else (),
            ),
            None,
        )
        return
    settings = _settings(config, (Document.DETERMINISM,))
    spec = (
        own_spec(settings, os.environ, exact=False)
        if stack is None
        else spec_from_file(stack, {}, exact=None, environ=os.environ)
    )
    with started(spec, quiet=True, with_router=spec.router is not None) as ready:
        yield ready


@pytest.fixture(scope="session")
def kvkeep_target(request: pytest.FixtureRequest) -> Iterator[Started]:
    """The stack under test, started if need be."""
    with _target(request.config) as ready:
        yield ready


@pytest.fixture(scope="session")
def kvkeep_checking(request: pytest.FixtureRequest) -> Checking:
    """How suites are run, as the options and the stack file have it."""
    config = request.config
    stack = config.getoption("--kvkeep-stack")
    spec = None if stack is None else spec_from_file(stack, {}, exact=None)
    return Checking(
        exact=spec is not None and spec.exact,
        results=results_folder(_settings(config, (Document.MULTI_PROCESS,))),
        bisects=not config.getoption("--kvkeep-no-bisect"),
        said=spec.check if spec else {},
        keeps_words=config.getoption("--kvkeep-profile") != "local",
    )


@pytest.fixture
def check_suite(
    request: pytest.FixtureRequest, kvkeep_checking: Checking
) -> Callable[[str], Sequence[Report]]:
    """Runs a suite by its name, and fails where it did not pass."""

    def check(name: str) -> Sequence[Report]:
        (suite,) = find(name)
        settings = _settings(request.config, (suite.document,))
        is_named = request.config.getoption("--kvkeep-url") is not None
        if suite.fleets is not None and not is_named:
            reports = _run_on_fleets(suite, settings, request.config, kvkeep_checking)
        else:
            target: Started = request.getfixturevalue("kvkeep_target")
            reports = asyncio.run(_run(suite, settings, target, kvkeep_checking))
        console = Console(width=120)
        for report in reports:
            if isinstance(report, NotApplicable):
                pytest.skip(report.reason)
            if isinstance(report, SuiteReport):
                show_suite(report, console)
            if isinstance(report, NotStarted):
                show_missing(report, console)
        counted = [report for report in reports if report.outcome not in UNCOUNTED]
        defects = [_why(report) for report in counted if not report.passed]
        assert not defects, "\n".join(defects)
        assert counted, "no fleet was started: the reasons stand above"
        return reports

    return check


def _run_on_fleets(
    suite: Suite, settings: CheckSettings, config: pytest.Config, checking: Checking
) -> Sequence[Report]:
    """What a suite found on every fleet that it starts, and why there are no others."""
    stack = config.getoption("--kvkeep-stack")
    template = (
        own_template(settings, os.environ, exact=checking.exact, suites=(suite,))
        if stack is None
        else template_from_file(stack, {}, exact=None, environ=os.environ)
    )
    assert suite.fleets is not None
    planned = suite.fleets(template, settings)

    def check(fleet: Fleet, ready: Started) -> Sequence[Report]:
        return asyncio.run(_run(suite, settings, ready, checking, fleet))

    fleets = [each for each in planned if isinstance(each, Fleet)]
    found: list[Report] = [each for each in planned if not isinstance(each, Fleet)]
    for ran in run_on_fleets(suite.name, fleets, check, quiet=True):
        found += ran.reports
    return found


async def _run(
    suite: Suite,
    settings: CheckSettings,
    target: Started,
    checking: Checking,
    fleet: Fleet | None = None,
) -> Sequence[Report]:
    url = settings.shakespeare_url
    words = load_words() if url is None else fetch_words(url)
    async with open_subject(
        target.addresses,
        timeout_s=settings.http_timeout_s,
        exact=checking.exact,
        settings=settings,
    ) as subject:
        context = Context(
            subject,
            settings,
            words,
            new_run_id=lambda: f"check-{secrets.token_hex(6)}",
            exact=checking.exact,
            named=checking.named(suite),
            results=checking.results if suite.document is Document.MULTI_PROCESS else None,
            fleet=fleet,
        )
        reports = await run_suite(suite, context)
        if checking.bisects:
            await look_closer(reports, context, target.restart)
        return reports


def _why(report: Report) -> str:
    """What did not hold, in a line."""
    found = report.to_dict()
    broken = [
        f"{check['name']}: {check['detail']}"
        for check in found.get("checks", ())
        if check["ok"] is False or (check["gate"] and check["ok"] is not True)
    ]
    counts = {name: num for name, num in found.get("counts", {}).items() if num}
    looked_into = [
        f"{suspect['prompt_id']}: {suspect['sentence']}" for suspect in found.get("suspects", ())
    ]
    return (
        f"{found['suite']} {found.get('mode', '')}: {report.outcome}; {counts}; {broken} "
        f"{found.get('reason', '')}{' '.join(looked_into)}"
    )
