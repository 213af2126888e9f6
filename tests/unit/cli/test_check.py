"""``kvkeep check`` without a stack file: which stacks it makes, and which suites run on each."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvkeep.cli import check as module
from kvkeep.cli.checking import Job, Runs
from kvkeep.stack.spec import StackSpec
from kvkeep.validate.settings import ENVIRONMENT
from kvkeep.validate.started import Started
from kvkeep.validate.subject import Addresses
from kvkeep.validate.suite.base import NotApplicable

PAIR = ["prefill-0", "decode-0"]


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], list[str]]]:
    """Engines and suites of each stack that is asked for; nothing is started."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    made: list[tuple[list[str], list[str]]] = []

    @contextmanager
    def started(spec: StackSpec, **_: object) -> Iterator[Started]:
        made.append(([engine.name for engine in spec.engines], []))
        yield Started(Addresses("http://nowhere"), None)

    def run_job(job: Job, _addresses: Addresses, runs: Runs, **_: object) -> None:
        made[-1][1].extend(suite.name for suite in job.suites)
        runs.note([NotApplicable(suite.name, "nothing runs here") for suite in job.suites])

    monkeypatch.setattr(module, "started", started)
    monkeypatch.setattr(module, "run_job", run_job)
    return made


def test_each_stack_has_what_its_suites_need(stacks: list[tuple[list[str], list[str]]]) -> None:
    """Engines that others don't need take no core from them."""
    CliRunner().invoke(module.check, ["quick"])

    plain = ["generation", "locality", "determinism", "determinism-concurrent"]
    assert stacks == [(["a"], plain), (["a", "b"], ["routing"]), (PAIR, ["pd-accuracy"])]


def test_a_suite_about_a_pair_gets_one(stacks: list[tuple[list[str], list[str]]]) -> None:
    """Also where its document is another one's."""
    CliRunner().invoke(module.check, ["determinism-disaggregated"])

    assert stacks == [(PAIR, ["determinism-disaggregated"])]


def test_no_stack_is_started_for_what_is_done(
    stacks: list[tuple[list[str], list[str]]], tmp_path: Path
) -> None:
    """A resumed group starts the stacks of the suites that are left."""
    path = tmp_path / "report.json"
    names = ("generation", "locality", "determinism", "determinism-concurrent", "routing")
    done = [{"suite": name, "outcome": "passed", "passed": True} for name in names]
    path.write_text(json.dumps({"runs": done}))

    CliRunner().invoke(module.check, ["quick", "--resume", "--json", str(path)])

    assert stacks == [(PAIR, ["pd-accuracy"])]
