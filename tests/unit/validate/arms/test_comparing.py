"""Arms: the same prompts by different ways, each compared with the first and proven by counters."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvkeep.model.errors import UnavailableError
from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.testing.fake_kv import FakeStore, Faults
from kvkeep.validate.arms import ArmsReport, Means, compare_arms, standard_arms
from kvkeep.validate.load import Endpoint, Sampling
from kvkeep.validate.prompts import documents
from kvkeep.validate.verdict import Verdict

Connect = Callable[..., Endpoint]

pytestmark = pytest.mark.usefixtures("no_pauses")

NAMES = ("cold", "cached", "reset", "other-engine", "restart")


@pytest.fixture
def compare(connect: Connect) -> Callable[..., Any]:
    """Compares arms of fake engines that share a store."""

    async def run(
        fake: FakeEngine, other: FakeEngine | None = None, names: tuple[str, ...] = NAMES
    ) -> ArmsReport:
        async def restart() -> None:
            fake.cache.clear()

        means = Means(
            connect(fake),
            connect(fake) if fake.store else None,
            connect(other) if other else None,
            restart=restart,
        )
        arms = standard_arms(names, means, run_id="r")
        prompts = [document.prompt() for document in documents(4, 60)]
        return await compare_arms(arms, prompts, Sampling(8), block_tokens=16, exact=True)

    return run


def arm_verdicts(report: ArmsReport) -> dict[str, set[Verdict]]:
    return {arm.name: {item.judgement.verdict for item in arm.judged} for arm in report.arms}


async def test_all_arms_of_a_right_stack_are_identical(compare: Any, store: FakeStore) -> None:
    """Computed, kept, loaded, loaded elsewhere and after a restart: the same bits."""
    report = await compare(FakeEngine(store=store), FakeEngine(store=store))

    assert report.passed
    assert [arm.name for arm in report.arms] == [
        *("cold", "fill", "cached", "reset", "other-engine", "restart")
    ]
    assert {v for found in arm_verdicts(report).values() for v in found} == {Verdict.IDENTICAL}
    assert all(arm.served.share == 1.0 for arm in report.arms if arm.source == "outside")


async def test_another_engine_without_the_store_is_not_exercised(
    compare: Any, store: FakeStore
) -> None:
    """An engine that computes everything itself agrees, and proves nothing."""
    report = await compare(FakeEngine(store=store), FakeEngine(store=FakeStore()))

    assert report.outcome == "not-exercised"
    assert arm_verdicts(report)["other-engine"] == {Verdict.NOT_EXERCISED}
    assert arm_verdicts(report)["reset"] == {Verdict.IDENTICAL}


async def test_a_wrong_block_fails_the_arm_it_reached(compare: Any, store: FakeStore) -> None:
    """A flipped bit is corruption where the KV was loaded, and nowhere else."""
    faulty = FakeEngine(store=store, faults=Faults(flip_every=3))

    report = await compare(faulty, FakeEngine(store=store))

    assert report.outcome == "failed"
    assert Verdict.CORRUPTION in arm_verdicts(report)["reset"]
    assert arm_verdicts(report)["cached"] == {Verdict.IDENTICAL}


async def test_a_cold_arm_that_was_served_proves_nothing(compare: Any, store: FakeStore) -> None:
    """A reference that was not computed is no reference."""

    class Unsalted(FakeEngine):
        def prefill(self, words: Any, salt: str = "") -> Any:
            return super().prefill(words)

    report = await compare(Unsalted(store=store), names=("cold", "reset"))

    assert not report.passed
    assert report.outcome == "not-exercised"


async def test_a_failed_reference_is_reported(compare: Any, store: FakeStore) -> None:
    """An error in the first arm is listed, though there is nothing to compare it with."""
    report = await compare(
        FakeEngine(store=store, faults=Faults(fail_every=4)), names=("cold", "cached")
    )

    assert arm_verdicts(report)["cold"] == {Verdict.ERROR}
    assert report.outcome == "failed"


async def test_a_reset_that_fails_stops_the_comparison(compare: Any, store: FakeStore) -> None:
    """Without a reset the arm can't be run, which is said instead of reported as passed."""
    with pytest.raises(UnavailableError, match="reset"):
        await compare(
            FakeEngine(store=store, faults=Faults(reset_refusals=-1)), names=("cold", "reset")
        )


async def test_one_arm_alone_never_passes(compare: Any, store: FakeStore) -> None:
    """A comparison with nothing is not a pass."""
    report = await compare(FakeEngine(store=store), names=("cold",))

    assert not report.passed


async def test_the_report_is_plain_data(compare: Any, store: FakeStore) -> None:
    """The JSON form names arms, sources, shares, checks and requests."""
    report = (await compare(FakeEngine(store=store), names=("cold", "reset"))).to_dict()

    reset = report["arms"][2]
    assert (reset["name"], reset["source"]) == ("reset", "outside")
    assert reset["served"]["share"] == 1.0
    assert reset["counts"]["identical"] == 4
    assert len(reset["requests"]) == 4


async def test_an_unknown_block_size_is_not_a_pass(connect: Connect, store: FakeStore) -> None:
    """Where the share can't be known the arms are not exercised."""
    arms = standard_arms(["cold", "reset"], Means(connect(FakeEngine(store=store))), run_id="r")
    prompts = [replace(document.prompt()) for document in documents(1, 60)]

    report = await compare_arms(arms, prompts, Sampling(4), block_tokens=None, exact=True)

    assert report.outcome == "not-exercised"
