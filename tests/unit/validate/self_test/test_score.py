"""The self-test counts what happened: it passes where it should and nowhere else."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvkeep.model.errors import UnavailableError
from kvkeep.validate.self_test import simulated
from kvkeep.validate.self_test.faults import BLOCK_SIZED, PlantedFault
from kvkeep.validate.self_test.planting import PlantedPool
from kvkeep.validate.self_test.score import Replay, StandScore, score
from kvkeep.validate.self_test.simulated import SimulatedStand
from kvkeep.validate.verdict import Judgement, Verdict

PROMPTS = 3


@pytest.fixture
def stand() -> Iterator[SimulatedStand]:
    """A small one."""
    with SimulatedStand.opened(PROMPTS, seed=1) as made:
        yield made


async def scored(stand: SimulatedStand, **more: Any) -> StandScore:
    return await score(stand, **{"rounds": 2, "pairs": 6, "seed": 1, **more})


async def test_every_fault_is_refused_below_and_caught_behind(stand: SimulatedStand) -> None:
    """Verification refuses all, the answers show all block-sized ones, and nothing else fails."""
    found = await scored(stand)

    assert found.passed, found
    assert [each.fault for each in found.store] == list(PlantedFault)
    assert {each.planted for each in [*found.store, *found.suites]} == {2 * PROMPTS}
    assert all(each.caught == each.planted for each in found.store)
    assert all(each.caught == each.planted for each in found.suites if each.fault in BLOCK_SIZED)
    assert (found.pairs, found.false_alarms) == (6, 0)


async def test_without_verification_the_store_score_falls(
    stand: SimulatedStand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where bytes are believed, faults below are not refused, and answers become wrong."""
    copy = stand._copier.load

    def believing(*arguments: Any) -> int:
        source, target, page_bytes, digests, ok = arguments
        stand._copier.digest(source, page_bytes, digests)
        return copy(source, target, page_bytes, digests, ok)

    monkeypatch.setattr(stand._copier, "load", believing)
    monkeypatch.setattr(stand._view, "readable", lambda slots, *_: np.ones(len(slots), np.bool_))

    found = await scored(stand)

    assert not found.passed
    zeroed = next(each for each in found.store if each.fault is PlantedFault.ZEROED)
    assert (zeroed.caught, zeroed.wrong_answers) == (0, zeroed.planted)


async def test_a_blind_judge_lowers_the_suites_score(
    stand: SimulatedStand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every answer passes, nothing behind verification is caught."""
    blind = Judgement(Verdict.IDENTICAL, "never looked")
    monkeypatch.setattr(simulated, "judge", lambda *_arguments, **_more: blind)

    found = await scored(stand)

    assert not found.passed
    assert {each.caught for each in found.suites} == {0}
    assert all(each.caught == each.planted for each in found.store)


async def test_a_nervous_judge_gives_false_alarms(
    stand: SimulatedStand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where right answers fail, each is counted and said."""
    nervous = Judgement(Verdict.DRIFT, "felt like it")
    monkeypatch.setattr(simulated, "judge", lambda *_arguments, **_more: nervous)

    found = await scored(stand)

    assert not found.passed
    assert found.false_alarms >= 6
    assert found.false_alarm_rate_max == 1.0
    assert "felt like it" in found.alarms[0]


async def test_what_was_not_loaded_proves_nothing(
    stand: SimulatedStand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault in a block that nobody read was not survived."""
    ask = stand.ask_again

    async def partly() -> Replay:
        replay = await ask()
        return Replay(replay.judgements, replay.num_refused, is_whole=False)

    monkeypatch.setattr(stand, "ask_again", partly)

    found = await scored(stand)

    assert not found.passed
    assert all(each.not_loaded == each.planted for each in found.suites)


async def test_pairs_that_were_not_loaded_prove_nothing(
    stand: SimulatedStand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two computed answers agree whatever the cache does."""
    ask = stand.ask_held_out

    async def partly(num: int) -> Replay:
        replay = await ask(num)
        return Replay(replay.judgements, replay.num_refused, is_whole=False)

    monkeypatch.setattr(stand, "ask_held_out", partly)

    found = await scored(stand)

    assert (found.pairs, found.pairs_not_loaded, found.passed) == (6, 6, False)


async def test_held_out_prompts_are_new_each_time(stand: SimulatedStand) -> None:
    """As many as were asked for, none of them struck or asked before."""
    asked: list[tuple[int, ...]] = []
    compute = stand._model.compute

    def noted(token_ids: Any) -> Any:
        asked.append(tuple(token_ids))
        return compute(token_ids)

    stand._model.compute = noted  # type: ignore[method-assign]
    replays = [await stand.ask_held_out(4) for _ in range(2)]

    assert [len(replay.judgements) for replay in replays] == [4, 4]
    assert len({*asked, *map(tuple, stand._tokens)}) == 8 + PROMPTS


def test_nothing_of_a_stand_lies_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the process ends, there is no file to remove."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    with SimulatedStand.opened(PROMPTS, seed=1):
        assert list(tmp_path.iterdir()) == []


async def test_blocks_that_never_come_back_end_the_test(
    stand: SimulatedStand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool too small for the prompts is said, not counted as a catch."""
    monkeypatch.setattr(PlantedPool, "slots", lambda _pool: {})

    with pytest.raises(UnavailableError, match="pool too small"):
        await scored(stand)


async def test_the_pool_is_whole_afterwards(stand: SimulatedStand) -> None:
    """What was planted is healed: the next replay loads everything and is right."""
    await scored(stand)

    replay = await stand.ask_again()

    assert replay.num_refused == 0
    assert {judgement.verdict for judgement in replay.judgements} == {Verdict.IDENTICAL}
