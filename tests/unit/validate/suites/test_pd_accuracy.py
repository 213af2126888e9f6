"""Hand-off: a pair that hands over passes; one that computes everything itself proves nothing."""

from typing import Any

import pytest

from kvkeep.testing.fake_kv import Faults
from kvkeep.validate.suites.pd_accuracy import run
from tests.unit.validate.conftest import Connect, MakeContext
from tests.unit.validate.suites.fake_pairs import FakePair

pytestmark = pytest.mark.usefixtures("no_pauses")


async def checked(make_context: MakeContext, connect: Connect, pair: FakePair) -> Any:
    async with pair.router() as router:
        context = await make_context(
            pair.decode,
            front=router,
            prefill=(connect(pair.prefill),),
            decode=(connect(pair.decode),),
        )
        (report,) = await run(context)
    return report


async def test_a_pair_that_hands_over_passes(make_context: MakeContext, connect: Connect) -> None:
    """Answers are those of one engine, and the decode engine did not compute the prompts."""
    report = await checked(make_context, connect, FakePair())

    assert (report.outcome, [c.name for c in report.checks if c.ok is not True]) == ("passed", [])
    assert report.numbers["handed_tokens"] >= 0.8 * report.numbers["servable_tokens"]


async def test_recomputing_is_not_exercised(make_context: MakeContext, connect: Connect) -> None:
    """A decode engine that computes every prompt answers right, and must not pass."""
    pair = FakePair()
    pair.hands_over = False

    report = await checked(make_context, connect, pair)

    assert report.outcome == "not-exercised"
    assert report.numbers["handed_tokens"] == 0


@pytest.mark.parametrize("faults", [Faults(flip_every=3), Faults(swap=True)])
async def test_wrong_blocks_fail(
    make_context: MakeContext, connect: Connect, faults: Faults
) -> None:
    """Blocks that arrive damaged, or are another prompt's, show in the answers."""
    report = await checked(make_context, connect, FakePair(faults))

    assert report.outcome == "failed"
