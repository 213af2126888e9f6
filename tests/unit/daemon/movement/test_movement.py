"""All movers together, over a disk in a folder."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import kvkeep.daemon.movement.movement as module
import kvkeep.daemon.movement.tier_set as tier_set
from kvkeep.core.admission import AdmitReason
from kvkeep.core.blocks import BlockState
from kvkeep.daemon.movement.lower_tier import LowerTier
from kvkeep.daemon.movement.movement import PREFETCHES_MAX, Movement
from kvkeep.daemon.movement.pace import LIMIT_PINNED_S
from kvkeep.daemon.settings import DaemonSettings
from kvkeep.daemon.tier_settings import AnyTierSettings, DiskTierSettings, ValkeyTierSettings
from kvkeep.model.clock import Clock, SystemClock
from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.model.layout import KvLayout
from kvkeep.tiers.faulty import TierFault
from tests.unit.daemon.movement.grounds import WAIT_S, Grounds, keys, wanted

COUNT = 20
BLOCKS = keys(0, COUNT)
WANTED = wanted(0, COUNT)
OTHER_LAYOUT = KvLayout(2, 2, 1024, 16, "bfloat16", "other")


class Rig:
    """A movement whose tier is the one of the grounds."""

    def __init__(self, grounds: Grounds, monkeypatch: pytest.MonkeyPatch) -> None:
        self.grounds = grounds
        self.counts: Counter[str] = Counter()
        self.opened_for: list[int] = []
        disk = DiskTierSettings(folder="unused", capacity_bytes=1 << 20)
        settings = DaemonSettings(planner="load", tiers=[disk])
        monkeypatch.setattr(tier_set, "open_tier", self._open)
        self.movement = Movement(settings, grounds.shell, SystemClock(), self._count)

    def _open(self, _settings: AnyTierSettings, value_bytes: int, _clock: Clock) -> LowerTier:
        self.opened_for.append(value_bytes)
        return self.grounds.tier

    def _count(self, name: str, amount: int) -> None:
        self.counts[name] += amount

    async def bring(self, limit_s: float = WAIT_S) -> list[float]:
        """Bring the prefix; returns what was announced."""
        announced: list[float] = []
        await asyncio.wait_for(self.movement.bring(WANTED, announced.append, limit_s), WAIT_S)
        return announced


@pytest.fixture
async def rig(grounds: Grounds, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    """Open tiers."""
    made = Rig(grounds, monkeypatch)
    await made.movement.opened()
    yield made
    grounds.medium.release()
    await made.movement.close()


async def test_what_is_stored_comes_back(rig: Rig) -> None:
    """Down, out of the pool, and up again."""
    rig.grounds.store(BLOCKS)
    rig.movement.stored(BLOCKS)
    while rig.counts["blocks_cascaded"] < COUNT:
        await asyncio.wait([asyncio.get_running_loop().run_in_executor(None, int)])
    rig.grounds.clear()
    assert rig.movement.may_come(WANTED, 0)
    announced = await rig.bring()

    assert rig.grounds.num_right(BLOCKS) == COUNT
    assert announced[0] == LIMIT_PINNED_S
    rig.grounds.assert_quiet()


async def test_blocks_from_before_are_copied_when_tiers_open(
    grounds: Grounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a restart, when nobody stores them again."""
    grounds.store(BLOCKS)
    rig = Rig(grounds, monkeypatch)
    await rig.movement.opened()
    while rig.counts["blocks_cascaded"] < COUNT:
        await asyncio.wait([asyncio.get_running_loop().run_in_executor(None, int)])

    assert grounds.kept(BLOCKS) == COUNT
    await rig.movement.close()


async def test_blocks_that_a_tier_has_are_not_written_again(
    grounds: Grounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked first, as after a restart nothing is remembered of it."""
    grounds.keep(BLOCKS[:15])
    grounds.store(BLOCKS)
    rig = Rig(grounds, monkeypatch)
    await rig.movement.opened()
    while rig.counts["blocks_cascaded"] < COUNT - 15:
        await asyncio.wait([asyncio.get_running_loop().run_in_executor(None, int)])
    if rig.movement._stocks:
        await asyncio.wait(rig.movement._stocks, timeout=WAIT_S)
    await rig.movement.close()

    assert rig.counts["blocks_cascaded"] == COUNT - 15
    assert grounds.tier.admission.num_by_reason[AdmitReason.PROBATION] == COUNT - 15


async def test_nobody_waits_longer_than_announced(rig: Rig) -> None:
    """A tier that hangs costs a counted wait; its slots are free once the call returns."""
    rig.grounds.keep(BLOCKS)
    rig.grounds.medium.chances = {TierFault.HANG: 1.0}
    announced = await rig.bring(limit_s=0.05)
    assert max(announced[1:], default=0.0) <= 0.05
    assert rig.counts["promotions_late"] == 1
    assert rig.grounds.node.ledger.num_by_state[BlockState.WRITING] == COUNT
    rig.grounds.medium.release()
    await asyncio.wait_for(_idle(rig), WAIT_S)

    rig.grounds.assert_quiet()


async def _idle(rig: Rig) -> None:
    promotion = rig.movement._promotion
    assert promotion is not None
    await promotion.drain(WAIT_S)


async def test_who_leaves_holds_nothing(rig: Rig) -> None:
    """What is on its way comes to its end, and nothing more is read for it."""
    rig.grounds.keep(BLOCKS)
    rig.grounds.medium.chances = {TierFault.HANG: 1.0}
    work = rig.movement.bring(WANTED, lambda _wait_s: None)
    task = asyncio.get_running_loop().create_task(work)
    await rig.grounds.hanging()
    task.cancel()
    await asyncio.wait([task])

    assert len(rig.grounds.node.reads) == 0
    rig.grounds.medium.release()
    await asyncio.wait_for(_idle(rig), WAIT_S)
    rig.grounds.assert_quiet()


async def test_a_prefetch_brings_what_nobody_waits_for(rig: Rig) -> None:
    """Behind what is there already, which stays meanwhile; then there is nothing to do."""
    rig.grounds.keep(BLOCKS)
    rig.grounds.store(BLOCKS[:4])
    assert rig.movement.prefetch(WANTED) == COUNT - 4
    await asyncio.wait_for(asyncio.gather(*rig.movement._prefetches), WAIT_S)

    assert rig.grounds.num_right(BLOCKS) == COUNT
    assert rig.movement.prefetch(WANTED) == 0
    assert (rig.counts["prefetches_asked"], rig.counts["prefetches_brought"]) == (2, 1)
    rig.grounds.assert_quiet()


async def test_prefetches_have_a_limit(rig: Rig) -> None:
    """Beyond it they are refused; a slow tier does not make them pile up."""
    many = [wanted(1000 * number, 2) for number in range(PREFETCHES_MAX + 2)]
    for each in many:
        rig.grounds.keep(each.keys(0))
    rig.grounds.medium.chances = {TierFault.HANG: 1.0}
    accepted = [rig.movement.prefetch(each) for each in many]
    rig.grounds.medium.release()
    await asyncio.wait_for(asyncio.gather(*rig.movement._prefetches), WAIT_S)

    assert accepted == [*[2] * PREFETCHES_MAX, 0, 0]
    assert rig.counts["prefetches_refused"] == 2
    rig.grounds.medium.chances = {}
    assert rig.movement.prefetch(many[-1]) == 2
    await asyncio.wait_for(asyncio.gather(*rig.movement._prefetches), WAIT_S)
    rig.grounds.assert_quiet()


async def test_a_prefetch_takes_no_block_that_is_lent(rig: Rig) -> None:
    """Where everything is lent nothing comes, and nothing is left behind."""
    rig.grounds.keep(BLOCKS)
    everything = keys(5000, len(rig.grounds.node.ledger.slots))
    rig.grounds.store(everything)
    lease_id = rig.movement._promotion.hold(wanted(5000, len(everything)), len(everything))  # type: ignore[union-attr]
    rig.movement.prefetch(WANTED)
    await asyncio.wait_for(asyncio.gather(*rig.movement._prefetches), WAIT_S)

    assert rig.grounds.num_right(everything) == len(everything)
    assert rig.counts["prefetches_brought"] == 0
    rig.movement._promotion.let_go(lease_id)  # type: ignore[union-attr]
    rig.grounds.assert_quiet()


async def test_the_end_does_not_wait_for_prefetches(rig: Rig) -> None:
    """What they read comes to its end; what they hold is given back."""
    rig.grounds.keep(BLOCKS)
    rig.grounds.store(BLOCKS[:4])
    rig.grounds.medium.chances = {TierFault.HANG: 1.0}
    rig.movement.prefetch(WANTED)
    await rig.grounds.hanging()
    closing = asyncio.get_running_loop().create_task(rig.movement.close())
    await asyncio.sleep(0)
    rig.grounds.medium.release()
    await asyncio.wait_for(closing, WAIT_S)

    assert not rig.movement._prefetches
    rig.grounds.assert_quiet()


async def test_another_layout_stops_the_movers_at_once(rig: Rig) -> None:
    """They know places of the former one: nothing may pass through them any more."""
    before = rig.movement._cascade
    rig.grounds.shell.open_layout(OTHER_LAYOUT)
    rig.movement.follow()
    assert rig.movement._cascade is not before
    assert before is not None
    assert before._is_over
    assert not rig.movement.may_come(WANTED, 0)
    await rig.movement.opened()

    assert rig.opened_for[1] > rig.opened_for[0]


async def test_a_layout_changed_again_meanwhile_leaves_the_latest(
    grounds: Grounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Movers are made for the pool as it is, not as it was when opening began."""
    rig = Rig(grounds, monkeypatch)
    rig.movement.follow()
    grounds.shell.open_layout(OTHER_LAYOUT)
    rig.movement.follow()
    await rig.movement.opened()

    assert rig.movement._cascade is not None
    assert rig.movement._cascade._view.geometry.layout == OTHER_LAYOUT
    await rig.movement.close()


async def test_a_tier_that_can_not_be_opened_is_named(
    grounds: Grounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon serves without it."""
    rig = Rig(grounds, monkeypatch)

    def fail(*_: object) -> LowerTier:
        raise InputError("no such thing")

    monkeypatch.setattr(tier_set, "open_tier", fail)
    await rig.movement.opened()

    assert rig.movement.status()["failed"] == {"disk": "no such thing"}
    assert rig.movement.tiers == []
    assert not rig.movement.may_come(WANTED, 0)
    await rig.movement.close()


async def test_rotten_blocks_are_deleted_in_a_tier_that_was_still_opening(
    grounds: Grounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have them."""
    grounds.keep(BLOCKS)
    rig = Rig(grounds, monkeypatch)
    rig.movement.follow()
    rig.movement.corrupt(BLOCKS[:3])
    await rig.movement.opened()
    while grounds.kept(BLOCKS) > COUNT - 3:
        await asyncio.wait([asyncio.get_running_loop().run_in_executor(None, int)])

    assert grounds.kept(BLOCKS[3:]) == COUNT - 3
    await rig.movement.close()


async def test_tiers_stand_in_the_order_of_the_settings(
    grounds: Grounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever is open first; and one that hangs neither delays the others nor the end."""
    tiers: list[AnyTierSettings] = [
        ValkeyTierSettings(url="valkey://127.0.0.1:1"),
        *(DiskTierSettings(folder=f"unused-{idx}", capacity_bytes=1 << 20) for idx in range(3)),
    ]
    release, latest = threading.Event(), threading.Event()

    def open_one(settings: AnyTierSettings, _bytes: int, _clock: Clock) -> LowerTier:
        if settings.name == "valkey":
            release.wait(WAIT_S)
            raise InputError("gone")
        if settings.name == "disk":
            assert latest.wait(WAIT_S)
        if settings.name == "disk-3":
            latest.set()
        return grounds.another_tier(settings.name)

    monkeypatch.setattr(tier_set, "open_tier", open_one)
    settings = DaemonSettings(planner="load", tiers=tiers)
    movement = Movement(settings, grounds.shell, SystemClock(), lambda *_: None)
    movement.follow()
    while len(movement.tiers) < 3:
        await asyncio.wait([asyncio.get_running_loop().run_in_executor(None, int)])
    names, status = [tier.name for tier in movement.tiers], movement.status()
    await asyncio.wait_for(movement.close(), WAIT_S)

    assert names == ["disk", "disk-2", "disk-3"]
    assert (status["is_open"], status["opening"]) == (False, ["valkey"])
    assert movement.is_hanging
    release.set()
    await asyncio.wait_for(movement.opened(), WAIT_S)


async def test_a_tier_that_can_not_be_opened_is_tried_again(
    grounds: Grounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once what was in its way is gone it serves; why it did not is forgotten then."""
    monkeypatch.setattr(tier_set, "RETRY_S", 0.0)
    rig = Rig(grounds, monkeypatch)
    may_open = False

    def open_one(settings: AnyTierSettings, num_bytes: int, clock: Clock) -> LowerTier:
        if not may_open:
            raise InputError("in the way")
        return rig._open(settings, num_bytes, clock)

    monkeypatch.setattr(tier_set, "open_tier", open_one)
    await rig.movement.opened()
    assert rig.movement.closed_tiers == {"disk": "in the way"}
    rig.movement.tick()
    await rig.movement.opened()
    assert rig.movement.tiers == []
    may_open = True
    rig.movement.tick()
    await rig.movement.opened()

    assert rig.movement.tiers == [grounds.tier]
    assert rig.movement.closed_tiers == {}
    await rig.movement.close()


async def test_a_tier_that_gives_other_bytes_is_switched_off(
    grounds: Grounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before it serves, and closed."""
    grounds.medium.chances = {TierFault.BIT_FLIP: 1.0}
    rig = Rig(grounds, monkeypatch)
    await rig.movement.opened()

    assert rig.movement.tiers == []
    assert "other bytes" in rig.movement.closed_tiers["disk"]
    assert rig.counts["tier_proofs_failed"] == 1
    rig.movement.tick()
    assert not rig.movement.status()["opening"]
    await rig.movement.close()


async def unanswering(grounds: Grounds, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A rig whose tier has the prefix and did not answer when it was opened."""
    monkeypatch.setattr(tier_set, "PROVE_S", 0.0)
    grounds.keep(BLOCKS)
    grounds.medium.chances = {TierFault.IO_ERROR: 1.0}
    rig = Rig(grounds, monkeypatch)
    await rig.movement.opened()
    return rig


async def asked_again(rig: Rig) -> None:
    """Let the tier be asked once to prove itself, and wait for what comes of that."""
    rig.movement.tick()
    assert rig.movement._set._proving
    await asyncio.wait(set(rig.movement._set._proving.values()), timeout=WAIT_S)


def proof_of(rig: Rig) -> object:
    """What ``/status`` says of the tier."""
    tiers = rig.movement.status()["tiers"]
    assert isinstance(tiers, list)
    return tiers[0]["proof"]


async def test_a_tier_that_did_not_answer_is_proven_before_it_serves(
    grounds: Grounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is taken from it or given to it until it has given back what it was given."""
    rig = await unanswering(grounds, monkeypatch)
    await asked_again(rig)
    assert proof_of(rig) == "awaited"
    grounds.medium.chances = {}
    with pytest.raises(UnavailableError, match="not proven"):
        await grounds.tier.read(BLOCKS[:1], [[memoryview(bytearray(grounds.value_bytes))]])
    assert not rig.movement.may_come(WANTED, 0)
    assert not grounds.tier.admits(keys(100, 1)[0])
    assert await grounds.tier.probe(BLOCKS) == [False] * COUNT

    await asked_again(rig)
    assert proof_of(rig) == "done"
    assert rig.movement.may_come(WANTED, 0)
    await rig.bring()
    assert grounds.num_right(BLOCKS) == COUNT
    rig.movement.tick()
    assert not rig.movement._set._proving
    await rig.movement.close()


async def test_what_was_stored_while_a_tier_did_not_answer_reaches_it(
    grounds: Grounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a restart: it takes stock of the pool."""
    rig = await unanswering(grounds, monkeypatch)
    later = keys(100, 5)
    grounds.store(later)
    rig.movement.stored(later)
    grounds.medium.chances = {}
    await asked_again(rig)
    while rig.counts["blocks_cascaded"] < len(later):
        await asyncio.wait([asyncio.get_running_loop().run_in_executor(None, int)])

    assert grounds.kept(later) == len(later)
    await rig.movement.close()


async def test_a_tier_that_first_answers_with_other_bytes_is_switched_off(
    grounds: Grounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named, counted and closed; none of its bytes was served, and it is not asked again."""
    rig = await unanswering(grounds, monkeypatch)
    grounds.medium.chances = {TierFault.BIT_FLIP: 1.0}
    await asked_again(rig)

    assert rig.movement.tiers == []
    assert "other bytes" in rig.movement.closed_tiers["disk"]
    assert rig.counts["tier_proofs_failed"] == 1
    assert not rig.movement.may_come(WANTED, 0)
    rig.movement.tick()
    assert not rig.movement._set._proving
    assert not rig.movement.status()["opening"]
    await rig.movement.close()


async def test_a_tier_that_answers_and_keeps_nothing_serves_what_it_has(
    grounds: Grounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full server is no wrong one; it is proven when it takes values again."""
    monkeypatch.setattr(tier_set, "PROVE_DECLINED_S", 0.0)
    grounds.keep(BLOCKS)
    grounds.medium.chances = {TierFault.DISK_FULL: 1.0}
    rig = Rig(grounds, monkeypatch)
    await rig.movement.opened()

    assert proof_of(rig) == "declined"
    await rig.bring()
    assert grounds.num_right(BLOCKS) == COUNT
    grounds.medium.chances = {}
    await asked_again(rig)
    assert proof_of(rig) == "done"
    await rig.movement.close()


async def test_the_end_does_not_wait_for_what_hangs(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slots stay marked, so that the next daemon waits for this process."""
    monkeypatch.setattr(module, "DRAIN_S", 0.02)
    monkeypatch.setattr(tier_set, "CLOSE_S", 0.02)
    rig.grounds.keep(BLOCKS)
    rig.grounds.medium.chances = {TierFault.HANG: 1.0}
    await rig.bring(limit_s=0.05)
    assert rig.movement._promotion is not None
    reads = set(rig.movement._promotion._reading)
    await asyncio.wait_for(rig.movement.close(), WAIT_S)

    rig.grounds.medium.release()
    await asyncio.wait(reads)
    assert rig.grounds.node.ledger.num_by_state[BlockState.WRITING] == COUNT


async def test_a_daemon_without_tiers_waits_for_nothing(tmp_path: Path) -> None:
    """And opens nothing."""
    grounds = Grounds(tmp_path)
    movement = Movement(DaemonSettings(), grounds.shell, SystemClock(), lambda *_: None)
    await movement.opened()
    movement.stored(BLOCKS)
    movement.used(WANTED, COUNT)

    assert not movement.may_come(WANTED, 0)
    assert movement.status()["is_open"] is False
    await movement.close()
    grounds.close()
