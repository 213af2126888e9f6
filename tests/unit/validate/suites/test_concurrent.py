"""Several at once: a right stack passes, calm and flooded; one that is wrong does not."""

import pytest

from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.testing.fake_kv import FakeStore, Faults
from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.suites.concurrent import run
from tests.unit.validate.conftest import MakeContext

pytestmark = pytest.mark.usefixtures("no_pauses")

SETTINGS = CheckSettings(ifeval_prompts=(12,), concurrent_requests=(4,))


async def test_a_right_stack_passes(make_context: MakeContext, store: FakeStore) -> None:
    """Calm and beside a flood everything comes back from outside, and equal."""
    reports = await run(await make_context(FakeEngine(store=store), settings=SETTINGS))

    assert [(r.mode, r.outcome) for r in reports] == [
        ("4 in flight", "passed"),
        ("4 in flight, flooded", "passed"),
    ]
    assert [r.served.share for r in reports if r.served] == [1.0, 1.0]
    assert reports[1].numbers["flood_requests"] > 0


async def test_lists_are_run_one_by_one(make_context: MakeContext, store: FakeStore) -> None:
    """Each number of workers and each answer length is a report of its own."""
    settings = CheckSettings(
        ifeval_prompts=(6,), concurrent_requests=(2, 3), concurrent_max_tokens=(4, 5)
    )

    reports = await run(await make_context(FakeEngine(store=store), settings=settings))

    assert [(r.mode[:1], r.sampling.max_tokens) for r in reports[::2]] == [
        ("2", 4),
        ("2", 5),
        ("3", 4),
        ("3", 5),
    ]


async def test_an_engine_alone_is_not_exercised(make_context: MakeContext) -> None:
    """Without a cache outside nothing is proven, at whatever rate."""
    reports = await run(await make_context(FakeEngine(), settings=SETTINGS))

    assert {report.outcome for report in reports} == {"not-exercised"}


@pytest.mark.parametrize("faults", [Faults(flip_every=2), Faults(swap=True), Faults(fail_every=5)])
async def test_a_planted_fault_fails(
    make_context: MakeContext, store: FakeStore, faults: Faults
) -> None:
    """Wrong blocks, foreign blocks and failed requests each fail a run."""
    reports = await run(
        await make_context(FakeEngine(store=store, faults=faults), settings=SETTINGS)
    )

    assert {report.outcome for report in reports} == {"failed"}
