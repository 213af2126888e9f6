"""The stack under test, from options, and a fixture that runs one suite against it.

Everything is started once for all tests of a session and stopped at its end. A suite that does not
apply to the stack is skipped with the reason; one that proved nothing fails.
"""

import asyncio
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from kvkeep.stack.machine import has_gpu
from kvkeep.validate.prompts import fetch_words, load_words
from kvkeep.validate.report.terminal import show_suite
from kvkeep.validate.settings import CheckSettings, Document, is_set, resolve
from kvkeep.validate.started import Started, own_spec, spec_from_file, started
from kvkeep.validate.subject import Addresses, open_subject
from kvkeep.validate.suite.base import Context, NotApplicable, Report, Suite, SuiteReport
from kvkeep.validate.suite.registry import find, run_suite
from kvkeep.validate.suite.results import results_folder

MARKERS = {
    "kvbm": "determinism of KV reuse",
    "e2e": "a whole stack",
    "slow": "takes a while",
    "nightly": "for runs at night",
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


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say what is to be checked."""
    group = parser.getgroup("kvkeep")
    group.addoption("--kvkeep-stack", type=Path, help="stack file to start and check")
    group.addoption("--kvkeep-profile", default="local", help="local or reference")
    group.addoption("--kvkeep-scale", help="small or full")
    for name, text in ADDRESSES.items():
        group.addoption(f"--kvkeep-{name}", help=f"address of {text}")


def pytest_configure(config: pytest.Config) -> None:
    """Make the markers known."""
    for name, text in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {text}")


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


@pytest.fixture
def check_suite(
    request: pytest.FixtureRequest, kvkeep_target: Started
) -> Callable[[str], Sequence[Report]]:
    """Runs a suite by its name, and fails where it did not pass."""

    def check(name: str) -> Sequence[Report]:
        (suite,) = find(name)
        settings = _settings(request.config, (suite.document,))
        reports = asyncio.run(_run(suite, settings, kvkeep_target.addresses))
        defects = []
        for report in reports:
            if isinstance(report, NotApplicable):
                pytest.skip(report.reason)
            if isinstance(report, SuiteReport):
                show_suite(report, Console(width=120))
            if not report.passed:
                defects.append(_why(report))
        assert not defects, "\n".join(defects)
        return reports

    return check


async def _run(suite: Suite, settings: CheckSettings, addresses: Addresses) -> Sequence[Report]:
    url = settings.shakespeare_url
    words = load_words() if url is None else fetch_words(url)
    async with open_subject(
        addresses, timeout_s=settings.http_timeout_s, settings=settings
    ) as subject:
        context = Context(
            subject,
            settings,
            words,
            new_run_id=lambda: f"check-{secrets.token_hex(6)}",
            words_fixed=is_set("word_count", {}, os.environ, (Document.DETERMINISM,)),
            results=results_folder(settings) if suite.document is Document.MULTI_PROCESS else None,
        )
        return await run_suite(suite, context)


def _why(report: Report) -> str:
    """What did not hold, in a line."""
    found = report.to_dict()
    broken = [
        f"{check['name']}: {check['detail']}"
        for check in found.get("checks", ())
        if check["ok"] is False or (check["gate"] and check["ok"] is not True)
    ]
    counts = {name: num for name, num in found.get("counts", {}).items() if num}
    return f"{found['suite']} {found.get('mode', '')}: {report.outcome}; {counts}; {broken}"
