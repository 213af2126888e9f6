"""Stress: every request is answered and counted, in every rhythm."""

import pytest

from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.testing.fake_kv import FakeStore, Faults
from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.suites import stress
from tests.unit.validate.conftest import MakeContext

pytestmark = pytest.mark.usefixtures("no_pauses")

SETTINGS = CheckSettings(concurrent_requests=(5,))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrivals follow at once."""
    monkeypatch.setattr(stress, "RATE_PER_S", 1000.0)
    monkeypatch.setattr(stress, "SUSTAINED_S", 0.02)
    monkeypatch.setattr(stress, "BURST_PAUSE_S", 0.0)


async def test_a_right_stack_passes(make_context: MakeContext, store: FakeStore) -> None:
    """Levels are judged answer by answer; rhythms by answers and statistics."""
    reports = await stress.run(await make_context(FakeEngine(store=store), settings=SETTINGS))

    assert [(report.mode, report.outcome) for report in reports] == [
        ("5 in flight, flooded", "passed"),
        ("sustained", "passed"),
        ("burst", "passed"),
        ("mixed", "passed"),
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

    reports = await stress.run(await make_context(fake, settings=SETTINGS))

    assert [report.outcome for report in reports] == ["failed"] * 4
    assert 0.5 < reports[2].numbers["answered_share"] < 1.0
