"""The arms that have names: what each needs, and where each one's KV has to come from."""

import pytest

from kvkeep.model.errors import InputError
from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.validate.arms import ARM_NAMES, ArmsReport, Means, compare_arms, standard_arms
from kvkeep.validate.load import Sampling
from kvkeep.validate.prompts import documents
from tests.unit.validate.arms.tiered_store import FakeTiers, TieredStore
from tests.unit.validate.conftest import Connect
from tests.unit.validate.suites.fake_pairs import FakePair

pytestmark = pytest.mark.usefixtures("no_pauses")


async def compared(means: Means, *names: str) -> ArmsReport:
    prompts = [document.prompt() for document in documents(3, 60)]
    arms = standard_arms(names, means, run_id="r")
    return await compare_arms(arms, prompts, Sampling(8), block_tokens=16, exact=True)


def made(connect: Connect, store: TieredStore) -> Means:
    fake = FakeEngine(store=store)
    return Means(connect(fake), connect(fake), tiers=FakeTiers(store))


async def test_each_tier_is_read_where_the_arm_says(connect: Connect) -> None:
    """What is nearer is emptied before, so that a disk and a far tier each serve their own arm."""
    store = TieredStore("disk", "valkey")

    report = await compared(made(connect, store), "cold", "cached", "reset", "disk", "remote")

    assert report.passed, report.to_dict()
    assert min(store.reads.values()) >= 6


async def test_only_the_tier_that_is_wrong_fails(connect: Connect) -> None:
    """Blocks that a disk gives back with another bit are wrong in its arm alone."""
    store = TieredStore("disk", "valkey", wrong="disk")

    report = await compared(made(connect, store), "cold", "reset", "disk", "remote")

    wrong = {item.phase for item in report.judged if item.judgement.verdict == "corruption"}
    assert wrong == {"disk"}


async def test_a_tier_that_another_one_answers_for_proves_nothing(connect: Connect) -> None:
    """Blocks that came from outside, but not from the disk, do not exercise the disk's arm."""
    store = TieredStore("disk", "valkey")
    means = made(connect, store)
    store.tiers["disk"] = {}
    store.tiers = dict(reversed(store.tiers.items()))

    report = await compared(means, "cold", "disk")

    assert report.outcome == "not-exercised"
    assert "read from the tier" in report.arms[-1].check.detail


async def test_a_prompt_that_is_handed_over_is_the_arm_hand_off(connect: Connect) -> None:
    """Asked at the router it comes to the decode engine from outside; asked there it does not."""
    pair = FakePair()
    async with pair.router() as router:
        engine = connect(pair.decode, model=pair.decode.model)
        found = await compared(Means(engine, front=router), "cold", "hand-off")
        alone = await compared(Means(engine, front=engine), "cold", "hand-off")

    assert found.passed, found.to_dict()
    assert alone.outcome == "not-exercised"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["warm"], "warm"),
        ([], "some of"),
        (["cold", "other-engine"], "second engine"),
        (["cold", "restart"], "--stack"),
        (["cold", "disk"], "a disk among"),
        (["cold", "remote"], "behind a network"),
        (["cold", "hand-off"], "router"),
    ],
)
async def test_arms_need_what_they_use(connect: Connect, names: list[str], said: str) -> None:
    """An unknown arm, or one without what it is made of, is refused."""
    with pytest.raises(InputError, match=said):
        standard_arms(names, Means(connect(FakeEngine())), run_id="r")


async def test_names_are_those_that_can_be_made(connect: Connect) -> None:
    """Of what is there, nearest first; the first three need nothing more than an engine."""
    engine, store = connect(FakeEngine()), TieredStore("disk")

    assert Means(engine).names == ["cold", "cached", "reset"]
    assert Means(engine, other=engine, tiers=FakeTiers(store)).names == [
        *("cold", "cached", "reset", "disk", "other-engine")
    ]
    assert set(ARM_NAMES) > {"remote", "hand-off", "restart"}


async def test_filling_comes_before_the_first_reuse(connect: Connect) -> None:
    """Where nothing is reused nothing is filled; else it is filled once, before."""
    means = Means(connect(FakeEngine()))

    assert [a.name for a in standard_arms(["cold"], means, run_id="r")] == ["cold"]
    names = [a.name for a in standard_arms(["cold", "cached", "reset"], means, run_id="r")]
    assert names == ["cold", "fill", "cached", "reset"]
