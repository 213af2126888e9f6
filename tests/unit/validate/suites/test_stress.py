"""Stress: every request is answered and counted, in every rhythm."""

from dataclasses import replace
from typing import Any

import pytest

from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.testing.fake_kv import FakeStore, Faults
from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.suite.asking import Said
from kvkeep.validate.suites import stress
from tests.unit.validate.conftest import MakeContext

pytestmark = pytest.mark.usefixtures("no_pauses")

FEW: dict[str, Any] = {
    "settings": CheckSettings(concurrent_requests=(3,)),
    "named": ["concurrent_requests"],
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrivals follow at once."""
    monkeypatch.setattr(stress, "RATE_PER_S", 1000.0)
    monkeypatch.setattr(stress, "SUSTAINED_S", 0.02)
    monkeypatch.setattr(stress, "BURST_PAUSE_S", 0.0)


async def test_a_right_stack_passes(make_context: MakeContext, store: FakeStore) -> None:
    """Levels that were named are judged answer by answer; rhythms by answers and statistics."""
    reports = await stress.run(await make_context(FakeEngine(store=store), **FEW))

    assert [(report.mode, report.outcome) for report in reports] == [
        ("3 in flight, flooded", "passed"),
        ("sustained", "passed"),
        ("burst", "passed"),
        ("mixed", "passed"),
        ("overload", "passed"),
    ]
    assert len(reports[2].phases[0].answers) == 15 + 2 + 20 + 3
    assert reports[1].numbers["answered_share"] == 1.0


async def test_without_a_number_all_levels_run(
    make_context: MakeContext, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3, 10, 25 and 50 in flight, where nobody named others."""
    monkeypatch.setattr(stress, "PROMPTS_LEAST", 4)
    monkeypatch.setattr(stress, "PROMPTS_PER_WORKER", 0)
    reports = await stress.run(await make_context(FakeEngine(store=store)))

    levels = [report.numbers["in_flight"] for report in reports if "in_flight" in report.numbers]
    assert levels == [3, 10, 25, 50]


@pytest.mark.parametrize("faults", [Faults(fail_every=7), Faults(cut_every=9)])
async def test_one_failed_answer_fails(
    make_context: MakeContext, store: FakeStore, faults: Faults
) -> None:
    """A share of 80 % would let these pass; every request has to be answered."""
    fake = FakeEngine(store=store, faults=faults)

    reports = await stress.run(await make_context(fake, **FEW))

    assert [report.outcome for report in reports] == ["failed"] * 5
    assert 0.5 < reports[2].numbers["answered_share"] < 1.0


REFUSED = Said(429, error='{"error": {"message": "too many"}}', retry_after="2")
ANSWERED = Said(200, "x", "stop", "m", "id", {"prompt_tokens": 3})


@pytest.mark.parametrize(
    ("said", "broken"),
    [
        ([ANSWERED, REFUSED, replace(REFUSED, status=503)], set()),
        ([ANSWERED, replace(REFUSED, retry_after=None)], {"refusals say when to come back"}),
        ([ANSWERED, replace(REFUSED, error="")], {"refusals say when to come back"}),
        ([ANSWERED, Said(500, error="Internal Server Error")], {"answered or refused"}),
        ([ANSWERED, replace(ANSWERED, finish_reason=None)], {"answered or refused"}),
        ([REFUSED, REFUSED], {"answered or refused"}),
    ],
)
async def test_too_much_at_once_is_refused_in_so_many_words(
    make_context: MakeContext, said: list[Said], broken: set[str]
) -> None:
    """429 or 503 with a reason and a time; anything else but an answer fails."""
    report = (await make_context(FakeEngine())).new_report("stress", "overload", 4)

    stress.judge_overload(report, said)

    assert {check.name for check in report.checks if check.ok is False} == broken
