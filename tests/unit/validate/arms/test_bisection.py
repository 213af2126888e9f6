"""Bisection names the nearest place from which an answer comes out wrong, and how often it does."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.testing.fake_kv import FakeStore, Faults, KvBlock
from kvkeep.validate.answer import Answer, Prompt
from kvkeep.validate.arms import Asking, Blocks, Means, Suspect, bisect, suspicious
from kvkeep.validate.load import Sampling
from kvkeep.validate.prompts import documents
from kvkeep.validate.runner import Judged
from kvkeep.validate.verdict import Judgement, Verdict
from tests.unit.validate.arms.tiered_store import FakeTiers, TieredStore
from tests.unit.validate.conftest import Connect

pytestmark = pytest.mark.usefixtures("no_pauses")

RUN = "the-run"
EXACT = Asking(Sampling(8), 16, exact=True)


def found_wrong(prompt: Prompt, verdict: Verdict = Verdict.CORRUPTION, index: int = 0) -> Judged:
    return Judged("phase 2", prompt, index, Judgement(verdict, "why"), Answer(), Answer())


def prompts(num: int) -> list[Prompt]:
    return [document.prompt() for document in documents(num, 60)]


@pytest.fixture
def look(connect: Connect) -> Callable[..., Any]:
    """Bisects one prompt that was wrong, on an engine that stored it in the run."""

    async def run(fake: FakeEngine, asking: Asking = EXACT, **more: Any) -> Suspect:
        ids = (f"new-{number}" for number in itertools.count())
        means = Means(connect(fake), connect(fake) if fake.store else None, **more)
        item = found_wrong(prompts(1)[0])
        await means.engine.chat(item.prompt.text, asking.sampling, salt=RUN)
        if isinstance(fake.store, SpoiledStore):
            fake.store.spoil()
        found = await bisect([item], means, asking, run_id=RUN, new_run_id=lambda: next(ids))
        assert len(found) == 1
        return found[0]

    return run


class SpoiledStore(FakeStore):
    """A store whose bytes go wrong once."""

    def spoil(self) -> None:
        """Flip a bit of every block that lies there now."""
        for key, block in self.blocks.items():
            self.blocks[key] = KvBlock(block.words, bytes([block.bits[0] ^ 1]) + block.bits[1:])


def wrong_in(suspect: Suspect) -> dict[str, int]:
    """How often it differed, by arm; arms about blocks of the run have a star."""
    return {
        f"{tally.arm}{'*' * (tally.blocks is Blocks.OF_THE_RUN)}": tally.differed
        for tally in suspect.tallies
        if tally.differed
    }


async def test_a_path_that_is_always_wrong_is_named(look: Any) -> None:
    """A disk that gives other bits is wrong for old and new blocks; the pool above it is not."""
    store = TieredStore("disk", "valkey", wrong="disk")

    suspect = await look(FakeEngine(store=store), tiers=FakeTiers(store))

    assert wrong_in(suspect) == {"disk*": 3, "disk": 3}
    assert (suspect.first.arm, suspect.first.blocks) == ("disk", Blocks.ANEW)
    assert "first wrong from a disk, 3 of 3 times, also with blocks stored anew" in suspect.sentence


async def test_bytes_that_went_wrong_once_are_told_from_a_wrong_path(look: Any) -> None:
    """Blocks of the run are wrong and new ones are right: the way to them is, too."""
    suspect = await look(FakeEngine(store=SpoiledStore()))

    assert wrong_in(suspect) == {"reset*": 3}
    assert suspect.first.blocks is Blocks.OF_THE_RUN
    assert "Blocks that the run stored are wrong" in suspect.sentence


async def test_an_engine_that_differs_from_itself_is_named(look: Any) -> None:
    """Computed answers that differ are the engine's doing, before any cache."""

    class Moody(FakeEngine):
        def prefill(self, words: Any, salt: str = "") -> Any:
            blocks, *rest = super().prefill(words, salt)
            mood = next(moods).to_bytes(1, "little")
            return [KvBlock(block.words, mood + block.bits[1:]) for block in blocks], *rest

    moods = itertools.count()

    suspect = await look(Moody(store=FakeStore()))

    assert (suspect.first.arm, suspect.first.blocks) == ("cold", Blocks.NONE)
    assert "that is the engine, before any cache" in suspect.sentence


async def test_what_does_not_come_back_is_said(look: Any) -> None:
    """An answer that is right however it is asked again is no proof of a wrong path."""
    suspect = await look(FakeEngine(store=FakeStore()))

    assert suspect.first is None
    assert {tally.unproven for tally in suspect.tallies} == {0}
    assert "it is right" in suspect.sentence


async def test_rounding_of_reused_kv_is_no_fault(look: Any) -> None:
    """But for the exact mode reused answers are held against what the engine itself kept."""
    asking = Asking(Sampling(24), 16, exact=False)

    suspect = await look(FakeEngine(store=FakeStore(), reuse_noise_nats=0.4), asking)

    assert wrong_in(suspect) == {}


async def test_a_wrong_path_is_found_beside_rounding(look: Any) -> None:
    """A swapped bit shows also where reused answers are allowed to round."""
    asking = Asking(Sampling(24), 16, exact=False)
    store = TieredStore("disk", wrong="disk")

    suspect = await look(
        FakeEngine(store=store, reuse_noise_nats=0.05), asking, tiers=FakeTiers(store)
    )

    assert suspect.first.arm == "disk"


async def test_an_arm_that_is_not_exercised_proves_nothing(look: Any) -> None:
    """An engine alone is asked again in vain, and that is counted."""
    suspect = await look(FakeEngine())

    unproven = {tally.arm: tally.unproven for tally in suspect.tallies}
    assert (unproven["cold"], unproven["cached"], unproven["reset"]) == (0, 0, 3)


async def test_what_breaks_off_keeps_what_was_found(look: Any) -> None:
    """A reset that is refused ends the bisection; arms before it are counted, and why is said."""
    suspect = await look(FakeEngine(store=FakeStore(), faults=Faults(reset_refusals=-1)))

    assert "could not be reset" in suspect.broken_off
    assert [tally.arm for tally in suspect.tallies][:3] == ["cold", "fill", "cached"]
    assert "Broken off" in suspect.sentence


async def test_a_restart_is_the_last_resort(look: Any) -> None:
    """An engine is restarted where no nearer place is wrong, and only there."""
    restarts = []

    def fleet(store: TieredStore) -> dict[str, Any]:
        engine = FakeEngine(store=store)

        async def restart() -> None:
            engine.cache.clear()
            restarts.append(store)

        return {"fake": engine, "tiers": FakeTiers(store), "restart": restart}

    wrong, right = TieredStore("disk", wrong="disk"), TieredStore("disk")
    await look(**fleet(wrong))
    await look(**fleet(right))

    assert restarts == [right]


def test_few_prompts_are_looked_into_each_once() -> None:
    """Wrong answers of three prompts; what failed or was right is left out."""
    made = prompts(5)
    judged = [found_wrong(made[0], Verdict.IDENTICAL), found_wrong(made[1], Verdict.ERROR)]
    judged += [found_wrong(prompt, index=i) for i, prompt in enumerate([*made, *made])]

    assert [item.index for item in suspicious(judged)] == [0, 1, 2]
