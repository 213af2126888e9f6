"""Cache performance: ratios by length and over a conversation, gated by where the KV came from."""

import pytest

from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.testing.fake_kv import FakeStore, Faults
from kvkeep.validate.answer import Answer, Prompt
from kvkeep.validate.counters import Counters
from kvkeep.validate.runner import Phase
from kvkeep.validate.suites import cache_performance
from kvkeep.validate.suites.cache_performance import run
from kvkeep.validate.verdict import PASSING
from tests.unit.validate.conftest import MakeContext

pytestmark = pytest.mark.usefixtures("no_pauses")

SPEED = {"first token sooner", "gain grows with length", "rounds sooner"}


def phase(times_s: dict[int, float]) -> Phase:
    prompts = tuple(Prompt(f"{length}-tokens-1", "x") for length in times_s)
    answers = tuple(Answer(text="x", ttft_s=ttft_s) for ttft_s in times_s.values())
    return Phase("p", prompts, answers, Counters({}, {}), 1.0)


@pytest.mark.parametrize(
    ("loaded", "broken"),
    [
        ({100: 0.08, 900: 0.3}, set()),
        ({100: 0.02, 900: 0.3}, {"gain grows with length"}),
        ({100: 0.1, 900: 0.95}, {"first token sooner"}),
    ],
)
async def test_ratios_are_asserted(
    make_context: MakeContext, loaded: dict[int, float], broken: set[str]
) -> None:
    """1.1 for the longest at least, and no less than for the shortest."""
    report = (await make_context(FakeEngine())).new_report("cache-performance", "x", 8)

    cache_performance._judge_lengths(report, [100, 900], phase({100: 0.1, 900: 1.0}), phase(loaded))

    assert {check.name for check in report.checks if check.ok is False} == broken


async def test_a_right_stack_proves_all_but_speed(
    make_context: MakeContext, store: FakeStore
) -> None:
    """A fake engine computes as fast as it loads; all else holds, by length and in rounds."""
    reports = await run(await make_context(FakeEngine(store=store)))

    assert [report.mode for report in reports] == ["by length", "rounds of a conversation"]
    for report in reports:
        assert {c.name for c in report.checks if c.ok is False} <= SPEED
        assert {item.judgement.verdict for item in report.judged} <= PASSING


async def test_an_engine_alone_is_not_exercised(make_context: MakeContext) -> None:
    """Without a cache there is no gain to be had, and no proof of one."""
    reports = await run(await make_context(FakeEngine()))

    gates = {c.name for r in reports for c in r.checks if c.gate and c.ok is False}
    assert gates == {"served share", "rounds come from outside"}
    assert not any(report.passed for report in reports)


async def test_a_wrong_block_fails(make_context: MakeContext, store: FakeStore) -> None:
    """A faster answer that is wrong is no gain."""
    fake = FakeEngine(store=store, faults=Faults(flip_every=2))

    reports = await run(await make_context(fake))

    assert reports[0].outcome == "failed"
    assert {item.judgement.verdict for item in reports[0].judged} - PASSING
