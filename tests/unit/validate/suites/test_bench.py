"""Bench: both runs of ``vllm bench serve``, their files, and what they have to show."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.suites import bench
from kvkeep.validate.suites.bench import run
from tests.unit.validate import reference_tables as tables
from tests.unit.validate.conftest import Connect, MakeContext

PROGRAM = """#!{python}
import json, sys
given = dict(zip(sys.argv, sys.argv[1:]))
num, length = int(given["--num-prompts"]), int(given["--random-input-len"])
name = given["--result-filename"]
print("ran with seed", given["--seed"])
if "{fault}" == name:
    sys.exit("no server answers")
rate = 1000.0 * {{"baseline.json": 1.0, "lmcache.json": {ratio}}}[name]
tokens = num * length + ({more} if name == "lmcache.json" else 0)
result = {{"total_input_tokens": tokens, "completed": num, "total_token_throughput": rate}}
open(given["--result-dir"] + "/" + name, "w").write(json.dumps(result))
"""


@pytest.fixture
def environment(tmp_path: Path) -> Any:
    """Makes a Python environment whose interpreter stands for vLLM's benchmark."""

    def make(ratio: float = 1.0, fault: str = "", more: int = 0) -> CheckSettings:
        program = tmp_path / "venv/bin/python"
        program.parent.mkdir(parents=True)
        text = PROGRAM.format(python=sys.executable, ratio=ratio, fault=fault, more=more)
        program.write_text(text)
        program.chmod(0o755)
        return CheckSettings(
            venv_dir=str(tmp_path / "venv"), num_prompts=4, random_input_len=300, random_seed=5
        )

    return make


async def checked(make_context: MakeContext, connect: Connect, settings: CheckSettings) -> Any:
    baseline = connect(FakeEngine(), model="fake-model")
    context = await make_context(FakeEngine(), settings=settings, baseline=baseline)
    (report,) = await run(context)
    return report


def broken(report: Any) -> set[str]:
    return {check.name for check in report.checks if check.ok is False}


async def test_equal_throughput_passes(
    make_context: MakeContext, connect: Connect, environment: Any, tmp_path: Path
) -> None:
    """Both complete, and the files are the document's, with its fields."""
    report = await checked(make_context, connect, environment())

    assert (report.outcome, broken(report)) == ("passed", set())
    for name in tables.RESULT_FILES:
        if name.startswith("vllm_bench/"):
            written = json.loads((tmp_path / "results" / name).read_text())
            assert all(field in written for field in tables.BENCH_FIELDS)
    assert "ran with seed 5" in (tmp_path / "results/vllm_bench/lmcache_output.txt").read_text()


async def test_lost_throughput_fails(
    make_context: MakeContext, connect: Connect, environment: Any
) -> None:
    """A loss of 3 % is more than storing may cost."""
    report = await checked(make_context, connect, environment(ratio=0.97))

    assert broken(report) == {"throughput"}
    assert report.numbers["throughput_ratio"] == pytest.approx(0.97)
    assert report.numbers["rounds"] == 3


async def test_unequal_prompts_fail(
    make_context: MakeContext, connect: Connect, environment: Any
) -> None:
    """One token more than the baseline had: the two did not do the same work."""
    report = await checked(make_context, connect, environment(more=1))

    assert broken(report) == {"equal input tokens"}


async def test_a_run_that_broke_down_is_said(
    make_context: MakeContext, connect: Connect, environment: Any
) -> None:
    """The program's last words are in the report, and nothing is compared."""
    report = await checked(make_context, connect, environment(fault="lmcache.json"))

    (check,) = [check for check in report.checks if check.ok is False]
    assert check.name == "vllm bench serve, lmcache"
    assert "no server answers" in check.detail
    assert report.suite == bench.NAME
    assert report.outcome == "failed"
