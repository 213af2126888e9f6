"""Determinism of a pair: passes where prompts are handed over, again after a reset of both."""

from typing import Any

import pytest

from kvkeep.testing.fake_kv import Faults
from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.suites.disaggregated import run
from tests.unit.validate.conftest import Connect, MakeContext
from tests.unit.validate.suites.fake_pairs import FakePair

pytestmark = pytest.mark.usefixtures("no_pauses")

SETTINGS = CheckSettings(max_iterations=4, word_count=60, max_tokens=(8,))


async def checked(make_context: MakeContext, connect: Connect, pair: FakePair) -> Any:
    async with pair.router() as router:
        context = await make_context(
            pair.decode,
            settings=SETTINGS,
            front=router,
            prefill=(connect(pair.prefill),),
            decode=(connect(pair.decode),),
        )
        (report,) = await run(context)
    return report


async def test_a_pair_passes(make_context: MakeContext, connect: Connect) -> None:
    """All is served from outside in both phases, and equal."""
    report = await checked(make_context, connect, FakePair())

    assert report.outcome == "passed"
    assert report.served.share == 1.0


async def test_computing_on_the_decode_engine_proves_nothing(
    make_context: MakeContext, connect: Connect
) -> None:
    """Where the router hands nothing over, nothing is shown."""
    pair = FakePair()
    pair.hands_over = False

    report = await checked(make_context, connect, pair)

    gates = {check.name for check in report.checks if check.gate and check.ok is False}
    assert "prompts are handed over" in gates
    assert report.outcome == "not-exercised"


async def test_a_wrong_block_fails(make_context: MakeContext, connect: Connect) -> None:
    """A flipped bit on the way is found."""
    report = await checked(make_context, connect, FakePair(Faults(flip_every=2)))

    assert report.outcome == "failed"
