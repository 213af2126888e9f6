"""What a suite found wrong is asked again, and the report says where it is first wrong."""

import pytest

from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.testing.fake_kv import FakeStore, Faults
from kvkeep.validate.arms.closer import look_closer, means_of
from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.suite.base import NotApplicable
from kvkeep.validate.suites.determinism import run
from tests.unit.validate.conftest import Connect, MakeContext

pytestmark = pytest.mark.usefixtures("no_pauses")

SETTINGS = CheckSettings(max_iterations=3, word_count=60, max_tokens=(8,))


async def test_a_suite_that_found_something_wrong_says_where(make_context: MakeContext) -> None:
    """Blocks that arrive with another bit are right on the engine and wrong after a reset."""
    faulty = FakeEngine(store=FakeStore(), faults=Faults(flip_every=1))
    context = await make_context(faulty, settings=SETTINGS)
    reports = await run(context)

    await look_closer(reports, context, None)

    suspects = reports[0].suspects
    assert 1 <= len(suspects) <= 3
    assert {suspect.first.arm for suspect in suspects if suspect.first} == {"reset"}
    assert reports[0].to_dict()["suspects"][0]["first"] == "reset"


async def test_what_passed_is_not_asked_again(make_context: MakeContext) -> None:
    """Nothing is sent where nothing is wrong, nor for a suite that did not run."""
    fake = FakeEngine(store=FakeStore())
    context = await make_context(fake, settings=SETTINGS)
    reports = await run(context)
    asked = dict(fake.counters)

    await look_closer([*reports, NotApplicable("x", "why")], context, None)

    assert reports[0].suspects == []
    assert fake.counters == asked


async def test_only_a_pair_hands_over(make_context: MakeContext, connect: Connect) -> None:
    """A router before engines that do everything themselves is no arm."""
    fake = FakeEngine(store=FakeStore())
    front, decode = connect(fake), (connect(fake),)

    alone = await make_context(fake, front=front)
    pair = await make_context(fake, front=front, decode=decode)

    assert "hand-off" not in means_of(alone, None).names
    assert "hand-off" in means_of(pair, None).names
