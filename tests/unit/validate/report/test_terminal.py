"""Tables: outcome, proof and evidence are all on the screen."""

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.testing.fake_kv import FakeStore, Faults
from kvkeep.validate.arms import Blocks, Means, Suspect, Tally, compare_arms, standard_arms
from kvkeep.validate.capability import probe
from kvkeep.validate.load import Endpoint, Sampling
from kvkeep.validate.prompts import documents, load_words
from kvkeep.validate.report.terminal import show_arms, show_suite
from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.subject import Subject
from kvkeep.validate.suite.base import SuiteReport
from kvkeep.validate.suites.determinism import Determinism, make_plan
from kvkeep.validate.verdict import Verdict

pytestmark = pytest.mark.usefixtures("no_pauses")

Connect = Callable[..., Endpoint]


def console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=200), text


async def shown(connect: Connect, fake: FakeEngine, **more: Any) -> str:
    engine = connect(fake)
    settings = CheckSettings(max_iterations=3)
    subject = Subject(engine, await probe(engine), connect(fake) if fake.store else None)
    plan = make_plan(settings, load_words(), 60)
    run = Determinism(subject, settings, plan, Sampling(8), exact=False, run_id="r", **more)
    screen, text = console()
    show_suite(await run.run(), screen)
    return text.getvalue()


async def test_a_pass_is_shown_with_its_proof(connect: Connect, store: FakeStore) -> None:
    """Phases, served share, verdicts and the outcome are shown."""
    text = await shown(connect, FakeEngine(store=store))

    assert "phase 2" in text
    assert "servable prompt tokens from outside" in text
    assert text.rstrip().endswith("passed")
    assert "FAILED" not in text


async def test_what_did_not_run_is_shown_as_such(connect: Connect) -> None:
    """An engine alone is shown as not exercised, with the reason."""
    text = await shown(connect, FakeEngine())

    assert "NOT EXERCISED" in text
    assert "80% needed" in text
    assert text.rstrip().endswith("not-exercised")


async def test_a_failure_is_shown_with_evidence(connect: Connect, store: FakeStore) -> None:
    """A wrong answer is shown beside the right one, with the fork and its best tokens."""
    text = await shown(connect, FakeEngine(store=store, faults=Faults(flip_every=2)))

    assert "corruption phase 2" in text
    assert "first difference at token" in text
    assert "reference: 'The code word is" in text
    assert text.rstrip().endswith("failed")


async def test_markup_in_an_answer_is_shown_as_it_is(connect: Connect, store: FakeStore) -> None:
    """What a model says is never taken for the terminal's markup."""

    class Rude(FakeEngine):
        def _reset(self):  # type: ignore[no-untyped-def]
            reply = super()._reset()
            reply.pieces = [(0.0, b'{"success": true, "said": "[/red] [bold]"}')]
            return reply

    assert "[/red] [bold]" in await shown(connect, Rude(store=store))


async def test_arms_are_shown(connect: Connect, store: FakeStore) -> None:
    """A comparison shows its arms, where their KV came from, and the outcome."""
    arms = standard_arms(["cold", "reset"], Means(connect(FakeEngine(store=store))), run_id="r")
    prompts = [document.prompt() for document in documents(2, 60)]
    report = await compare_arms(arms, prompts, Sampling(4), block_tokens=16, exact=True)
    screen, text = console()

    show_arms(report, screen)

    assert "arm reset" in text.getvalue()
    assert text.getvalue().rstrip().endswith("passed")


async def test_what_was_looked_into_is_shown(connect: Connect, store: FakeStore) -> None:
    """Where an answer is first wrong, and how often in which arm."""
    engine = connect(FakeEngine(store=store))
    subject = Subject(engine, await probe(engine), engine)
    report = SuiteReport("s", "m", "r", True, Sampling(8), CheckSettings(), subject)
    tallies = [Tally("reset", Blocks.OF_THE_RUN, 3, 0), Tally("disk", Blocks.ANEW, 3, 2, 1)]
    report.suspects = [Suspect("document-7", "phase 2", Verdict.CORRUPTION, tallies)]
    screen, text = console()

    show_suite(report, screen)

    assert "document-7 asked again. It is first wrong from a disk, 2 of 3 times" in text.getvalue()
    assert "reset (blocks of the run) 0 of 3, disk 2 of 2" in text.getvalue()
