"""Long documents: orders, limits, result files, and what is wrong fails."""

import json
from pathlib import Path

import pytest

from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.testing.fake_kv import FakeStore, Faults
from kvkeep.validate.answer import Answer, Prompt
from kvkeep.validate.counters import Counters
from kvkeep.validate.runner import Phase
from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.suites import long_doc_qa
from kvkeep.validate.suites.long_doc_qa import first_of_each, in_order, run
from kvkeep.validate.verdict import PASSING
from tests.unit.validate import reference_tables as tables
from tests.unit.validate.conftest import MakeContext

pytestmark = pytest.mark.usefixtures("no_pauses")

SETTINGS = CheckSettings(num_documents=3, document_length=300, output_len=8)
SPEED = {"first token sooner", "round shorter", "warm-up costs little"}


def prompts(num: int) -> list[Prompt]:
    return [Prompt(f"p{i}", f"text {i}") for i in range(num)]


def phase(name: str, ttft_s: float, wall_s: float, num: int = 2) -> Phase:
    answer = Answer(text="x", finish_reason="length", ttft_s=ttft_s, total_s=wall_s / num)
    return Phase(name, tuple(prompts(num)), (answer,) * num, Counters({}, {}), wall_s)


def test_orders() -> None:
    """In turn, each twice in a row, and shuffled the same way for the same seed."""
    names = [p.prompt_id for p in in_order(prompts(3), ("tile", "interleave"), 1)]

    assert names == ["p0", "p1", "p2", "p0", "p0", "p1", "p1", "p2", "p2"]
    shuffled = in_order(prompts(9), ("random",), 1)
    assert shuffled == in_order(prompts(9), ("random",), 1) != prompts(9)
    assert sorted(p.prompt_id for p in shuffled) == [f"p{i}" for i in range(9)]


def test_only_the_first_time_counts() -> None:
    """Repeats may come from the engine itself and don't flatter the cache."""
    answers = tuple(
        Answer(text="x", ttft_s=ttft_s, total_s=2 * ttft_s) for ttft_s in (1.0, 0.1, 3.0, 0.1)
    )
    asked = (*prompts(1), *prompts(1), prompts(2)[1], *prompts(1))

    first = first_of_each(Phase("q", asked, answers, Counters({}, {}), 8.4))

    assert [answer.ttft_s for answer in first.answers] == [1.0, 3.0]
    assert first.wall_s == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("ttft_s", "round_s", "warm_s", "broken"),
    [
        (0.39, 0.84, 1.19, set()),
        (0.45, 0.84, 1.19, {"first token sooner"}),
        (0.39, 0.90, 1.19, {"round shorter"}),
        (0.39, 0.84, 1.25, {"warm-up costs little"}),
    ],
)
async def test_speed_is_judged_against_computing(
    make_context: MakeContext, ttft_s: float, round_s: float, warm_s: float, broken: set[str]
) -> None:
    """60 % sooner, 15 % shorter, 1.2 times the warm-up: each fails by itself."""
    report = (await make_context(FakeEngine())).new_report("long-doc-qa", "x", 8)

    long_doc_qa._judge_speed(
        report, phase("c", 1.0, 2.0), phase("w", 1.0, 2 * warm_s), phase("q", ttft_s, 2 * round_s)
    )

    assert {check.name for check in report.checks if check.ok is False} == broken
    assert report.numbers["query_ttft_per_prompt"] == pytest.approx(ttft_s)


async def test_named_limits_are_kept(make_context: MakeContext) -> None:
    """A limit in seconds that somebody named fails where it is passed."""
    settings = CheckSettings(max_ttft_s=0.2, max_query_round_time_s=0.5)
    context = await make_context(FakeEngine(), settings=settings)
    report = context.new_report("long-doc-qa", "x", 8)

    long_doc_qa._judge_limits(report, 0.3, 0.4)

    assert {c.name: c.ok for c in report.checks} == {
        "first token in time": False,
        "round in time": True,
    }


async def test_documents_come_back_and_files_are_written(
    make_context: MakeContext, store: FakeStore, tmp_path: Path
) -> None:
    """All is served from outside and right; the files and fields are the document's."""
    (report,) = await run(await make_context(FakeEngine(store=store), settings=SETTINGS))

    broken = {check.name for check in report.checks if check.ok is False}
    assert broken <= SPEED  # a fake engine computes no slower than it loads
    assert report.served is not None
    assert report.served.share == 1.0
    assert {item.judgement.verdict for item in report.judged} <= PASSING
    folder = tmp_path / "results"
    for name in tables.RESULT_FILES:
        if name.startswith("long_doc_qa/"):
            assert (folder / name).is_file(), name
    result = json.loads((folder / "long_doc_qa/lmcache_result.json").read_text())
    assert all(isinstance(result[field], float) for field in tables.LONG_DOC_QA_FIELDS)


async def test_a_wrong_block_fails(make_context: MakeContext, store: FakeStore) -> None:
    """A flipped bit in a document's block is found in its answer."""
    fake = FakeEngine(store=store, faults=Faults(flip_every=3))

    (report,) = await run(await make_context(fake, settings=SETTINGS))

    assert report.outcome == "failed"
    assert {item.judgement.verdict for item in report.judged} - PASSING


async def test_lengths_beyond_the_model_give_way(make_context: MakeContext) -> None:
    """A document longer than the engine takes is cut, and the report says both sizes."""
    settings = CheckSettings(num_documents=2, document_length=100_000, output_len=8)

    (report,) = await run(await make_context(FakeEngine(), settings=settings))

    asked_and_run = report.sizes["document_length"]
    assert asked_and_run["asked"] == 100_000
    assert asked_and_run["run"] < 8192
    assert not any(answer.error for p in report.phases for answer in p.answers)
