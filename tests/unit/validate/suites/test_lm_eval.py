"""lm-eval: both runs, their files, and items that differ."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.validate.answer import Answer, TokenStep
from kvkeep.validate.counters import LOCAL_QUERIES, Counters
from kvkeep.validate.load import Endpoint
from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.suites import lm_eval
from kvkeep.validate.suites.lm_eval import Graded, gap_at_fork, run
from kvkeep.validate.verdict import Verdict
from tests.unit.validate import reference_tables as tables
from tests.unit.validate.conftest import MakeContext

pytestmark = pytest.mark.usefixtures("no_pauses")

# Answers every item with its result; where it differs, the second run says one other word.
PROGRAM = """#!{python}
import json, pathlib, sys
given = dict(zip(sys.argv, sys.argv[1:]))
folder = pathlib.Path(given["--output_path"])
(folder / "fake-model").mkdir()
task = given["--tasks"]
rows = [json.loads(line) for line in open(folder.parent / (task + ".jsonl"))]
with open(folder / "fake-model" / ("samples_" + task + "_2026.jsonl"), "w") as file:
    for i, row in enumerate(rows):
        text = " so many. #### " + row["answer"]
        if folder.name == "second_run" and i < {differs}:
            text = " about" + text
        sample = {{"doc_id": i, "resps": [[text]], "exact_match": 1.0}}
        file.write(json.dumps(sample) + "\\n")
sys.exit("{fault}" and folder.name == "{fault}" and "it broke down" or 0)
"""


@pytest.fixture
def environment(tmp_path: Path) -> Any:
    """Makes a Python environment whose interpreter stands for lm-evaluation-harness."""

    def make(*, differs: int = 0, fault: str = "", strict: bool = False) -> CheckSettings:
        program = tmp_path / "venv/bin/python"
        program.parent.mkdir(parents=True)
        program.write_text(PROGRAM.format(python=sys.executable, differs=differs, fault=fault))
        program.chmod(0o755)
        return CheckSettings(venv_dir=str(tmp_path / "venv"), limit=6, strict=strict)

    return make


def tie(gap_nats: float) -> Answer:
    """A computed answer whose first token ties with another to within ``gap_nats``."""
    top = ((" so", -0.5), (" about", -0.5 - gap_nats))
    rest = (TokenStep(" many.", -0.1, ((" many.", -0.1), (" few.", -3.0))),)
    return Answer(" so many.", (TokenStep(" so", -0.5, top), *rest), "stop")


async def checked(make_context: MakeContext, settings: CheckSettings) -> Any:
    (report,) = await run(await make_context(FakeEngine(), settings=settings))
    return report


async def test_equal_runs_and_their_files(
    make_context: MakeContext, environment: Any, tmp_path: Path
) -> None:
    """All items are equal, and the sample files lie where the document has them."""
    report = await checked(make_context, environment())

    assert {item.judgement.verdict for item in report.judged} == {Verdict.IDENTICAL}
    assert report.numbers["strict_equal"] is True
    assert report.numbers["second_run_right"] == 6
    for pattern in tables.RESULT_FILES:
        if pattern.startswith("lm_eval/"):
            assert len(list((tmp_path / "results").glob(pattern))) == 1, pattern


async def test_given_tasks_are_graded(
    make_context: MakeContext, environment: Any, tmp_path: Path
) -> None:
    """GSM8K is asked where somebody gives it, and the report says so; it has fewer than asked."""
    file = tmp_path / "test.jsonl"
    row = {"question": "How many?", "answer": "2 + 3 = <<2+3=5>>5\n#### 1,005"}
    file.write_text("".join(json.dumps(row) + "\n" for _ in range(5)))
    settings = replace(environment(), gsm8k_file=str(file))

    report = await checked(make_context, settings)

    assert (report.data, report.sizes["limit"]) == (str(file), {"asked": 6, "run": 5})
    folder = tmp_path / "results/lm_eval"
    assert len(list(folder.glob("first_run/samples_gsm8k_given_*.jsonl"))) == 1
    assert yaml.safe_load((folder / "gsm8k_given.yaml").read_text())["task"] == "gsm8k_given"
    rows = [json.loads(line) for line in (folder / "gsm8k_given.jsonl").read_text().splitlines()]
    assert {row["answer"] for row in rows} == {"1005"}


async def test_runs_that_loaded_nothing_prove_nothing(
    make_context: MakeContext, environment: Any
) -> None:
    """Equal answers of which none came from outside are no pass."""
    report = await checked(make_context, environment())

    assert report.outcome == "not-exercised"


@pytest.mark.parametrize(("gap_nats", "verdict"), [(0.02, Verdict.NEAR_TIE), (1.5, Verdict.DRIFT)])
async def test_differing_items_are_asked_again(
    make_context: MakeContext,
    environment: Any,
    monkeypatch: pytest.MonkeyPatch,
    gap_nats: float,
    verdict: Verdict,
) -> None:
    """A difference is excused where the two tokens tie, and nowhere else."""

    async def computed(_engine: Endpoint, _text: str, _salt: str, _max_tokens: int) -> Answer:
        return tie(gap_nats)

    monkeypatch.setattr(lm_eval, "complete", computed)

    report = await checked(make_context, environment(differs=2))

    assert [item.judgement.verdict for item in report.judged][:3] == [
        verdict,
        verdict,
        Verdict.IDENTICAL,
    ]
    assert report.numbers["unequal_to_first_run"] == 2


async def test_strict_demands_equal_bytes(
    make_context: MakeContext, environment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the document does: a tie is no excuse."""

    async def computed(_engine: Endpoint, _text: str, _salt: str, _max_tokens: int) -> Answer:
        return tie(0.02)

    monkeypatch.setattr(lm_eval, "complete", computed)

    report = await checked(make_context, environment(differs=1, strict=True))

    assert "equal to first_run, byte by byte" in {
        check.name for check in report.checks if check.ok is False
    }
    assert report.outcome == "failed"


async def test_a_run_that_broke_down_is_said(make_context: MakeContext, environment: Any) -> None:
    """The program's last words are in the report."""
    report = await checked(make_context, environment(fault="second_run"))

    (check,) = [check for check in report.checks if check.ok is False]
    assert (check.name, "it broke down" in check.detail) == ("lm_eval, second_run", True)


@pytest.mark.parametrize(("external", "ok"), [(800, True), (500, False), (0, False)])
async def test_the_share_is_of_what_could_be_served(
    make_context: MakeContext, external: int, ok: bool
) -> None:
    """Ten prompts of 116 tokens in blocks of 16: a thousand tokens could come from outside."""
    report = (await make_context(FakeEngine())).new_report("lm-eval", "x", 8)
    delta = Counters({LOCAL_QUERIES: 1160.0, "vllm:external_prefix_cache_hits": external}, {})

    lm_eval._check_served(report, Graded(dict.fromkeys(range(10), "x"), {}, delta))

    assert report.checks[-1].ok is ok


def test_the_fork_is_found_in_text() -> None:
    """Where a text leaves the computed one the gap counts; one that only stopped left nowhere."""
    answer = tie(0.2)

    assert gap_at_fork(answer, " about many.") == pytest.approx(0.2)
    assert gap_at_fork(answer, " so few.") == pytest.approx(2.9)
    assert gap_at_fork(answer, " so many. #### 3") is None
    assert gap_at_fork(answer, " so ma") is None


def test_the_task_file_is_yaml() -> None:
    """What lm-evaluation-harness reads: the prompt, the answer, and where the rows are."""
    text = lm_eval.TASK_FILE.format(task="t", data="/tmp/x.jsonl", max_tokens=9)
    task = yaml.safe_load(text)

    assert task["doc_to_text"] == "{{prompt}}"
    assert task["generation_kwargs"]["max_gen_toks"] == 9
    assert json.dumps(task["dataset_kwargs"]) == '{"data_files": {"test": "/tmp/x.jsonl"}}'
