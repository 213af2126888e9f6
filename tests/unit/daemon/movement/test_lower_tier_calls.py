"""A tier as the event loop sees it."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvkeep.core.admission import AdmitReason
from kvkeep.daemon.movement.proving import BATCH, Proof
from kvkeep.daemon.movement.slots import all_parts
from kvkeep.model.errors import UnavailableError
from kvkeep.model.ids import BlockKey
from kvkeep.tiers.base import Parts
from kvkeep.tiers.faulty import TierFault
from kvkeep.tiers.io_queue import QueueLimits
from kvkeep.tiers.memory import MemoryTier
from tests.unit.daemon.movement.grounds import WAIT_S, Grounds, keys

BLOCKS = keys(0, 30)


@pytest.mark.parametrize("probes_at_once", [1, 7, 1024])
@pytest.mark.parametrize("num_kept", [0, 1, 2, 15, 29, 30])
async def test_a_probe_finds_the_end_of_a_prefix(
    tmp_path: Path, probes_at_once: int, num_kept: int
) -> None:
    """In batches or by bisection."""
    grounds = Grounds(tmp_path, probes_at_once=probes_at_once)
    if num_kept:
        grounds.keep(BLOCKS[:num_kept])

    found = await grounds.tier.probe(BLOCKS)
    assert found == [True] * num_kept + [False] * (30 - num_kept)
    grounds.close()


async def test_a_tier_that_can_not_be_asked_has_nothing(grounds: Grounds) -> None:
    """Once it was left alone, nobody even asks."""
    grounds.keep(BLOCKS)
    assert grounds.tier.may_have(BLOCKS[0])
    grounds.queue.close(WAIT_S)

    assert await grounds.tier.probe(BLOCKS) == [False] * 30


async def test_what_was_read_or_written_is_known(grounds: Grounds) -> None:
    """Without a call; what was found missing is not."""
    grounds.keep(BLOCKS[:2])
    assert not grounds.tier.has(BLOCKS[0])
    await grounds.tier.read(BLOCKS[:3], all_parts(grounds.view, [0, 1, 2]))

    assert [grounds.tier.has(key) for key in BLOCKS[:3]] == [True, True, False]
    grounds.tier.delete(BLOCKS[:1])
    assert not grounds.tier.has(BLOCKS[0])


async def test_one_believed_block_that_is_missing_makes_all_doubtful(tmp_path: Path) -> None:
    """Also those that nobody asked for: they are admitted again, and the pool is gone through."""
    grounds = Grounds(tmp_path, probes_at_once=1)
    grounds.keep(BLOCKS)
    await grounds.tier.read(BLOCKS, all_parts(grounds.view, list(range(30))))
    assert grounds.tier.has(BLOCKS[20])
    assert not grounds.tier.wants_stock
    grounds.medium.delete(BLOCKS)

    assert await grounds.tier.probe(BLOCKS) == [False] * 30
    assert not grounds.tier.has(BLOCKS[20])
    assert grounds.tier.wants_stock
    grounds.close()


async def test_a_call_that_failed_makes_all_doubtful_until_one_goes_well(grounds: Grounds) -> None:
    """A server may come back without what it had; it is gone through when it answers."""
    grounds.keep(BLOCKS)
    await grounds.tier.read(BLOCKS, all_parts(grounds.view, list(range(30))))
    grounds.medium.chances = {TierFault.IO_ERROR: 1.0}
    with pytest.raises(UnavailableError):
        await grounds.tier.read(BLOCKS[:1], all_parts(grounds.view, [0]))
    assert not grounds.tier.has(BLOCKS[20])
    assert not grounds.tier.wants_stock
    grounds.medium.chances = {}
    await grounds.tier.read(BLOCKS[:1], all_parts(grounds.view, [0]))

    assert grounds.tier.wants_stock


async def test_what_it_has_is_not_admitted_again(grounds: Grounds) -> None:
    """Nor is anything while it is being cleared."""
    grounds.store(BLOCKS[:1])
    slot = grounds.node.ledger.find(BLOCKS[0])
    assert slot is not None
    grounds.tier.seen(BLOCKS[0])
    assert grounds.tier.admits(BLOCKS[0])
    assert await grounds.tier.write(BLOCKS[:1], all_parts(grounds.view, [slot.idx])) == [True]

    assert not grounds.tier.admits(BLOCKS[0])
    grounds.tier.is_held = True
    assert not grounds.tier.admits(BLOCKS[1])
    assert grounds.tier.admission.num_by_reason[AdmitReason.PROBATION] == 1


@pytest.mark.parametrize("fault", [TierFault.IO_ERROR, TierFault.DISK_FULL])
async def test_a_write_that_fails_gives_the_booking_back(
    grounds: Grounds, fault: TierFault
) -> None:
    """Whether the tier fails or declines."""
    grounds.medium.chances = {fault: 1.0}
    for key in BLOCKS[:3]:
        grounds.tier.seen(key)
        assert grounds.tier.admits(key)
    assert grounds.tier.admission.probation_bytes == 3 * grounds.value_bytes
    try:
        await grounds.tier.write(BLOCKS[:3], all_parts(grounds.view, [0, 1, 2]))
    except UnavailableError:
        assert fault is TierFault.IO_ERROR

    assert grounds.tier.admission.probation_bytes == 0


@pytest.mark.parametrize(("queue_bytes_max", "batch_blocks"), [(1, 1), (8 * 2112, 2)])
async def test_batches_fit_the_queue(
    tmp_path: Path, queue_bytes_max: int, batch_blocks: int
) -> None:
    """A quarter of it at most, and at least one value."""
    grounds = Grounds(tmp_path, limits=QueueLimits(queue_bytes_max=queue_bytes_max))
    assert grounds.tier.batch_blocks == batch_blocks
    grounds.close()


async def test_a_read_waits_for_its_turn_and_is_not_refused(tmp_path: Path) -> None:
    """Promotions together use half of the queue, however many they are."""
    grounds = Grounds(tmp_path, limits=QueueLimits(queue_bytes_max=4 * 2112))
    grounds.keep(BLOCKS[:1])
    reads = [grounds.tier.read(BLOCKS[:1], all_parts(grounds.view, [idx])) for idx in range(12)]
    found = await asyncio.wait_for(asyncio.gather(*reads), WAIT_S)

    assert found == [[grounds.value_bytes]] * 12
    grounds.close()


async def test_nothing_stays_of_proofs_that_arrived_late(
    grounds: Grounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a server that stood still: few values however often it was asked, and then none."""
    tier, medium = grounds.tier, grounds.medium
    good, inner = medium.write, medium._inner
    assert isinstance(inner, MemoryTier)

    def arrive_late(keys: Sequence[BlockKey], values: Sequence[Parts]) -> list[bool]:
        good(keys, values)
        raise UnavailableError("no answer in time")

    monkeypatch.setattr(medium, "write", arrive_late)
    tier.proof = Proof.AWAITED
    for _ in range(3):
        with pytest.raises(UnavailableError):
            await tier.prove()
        tier.tick()
    assert len(list(inner.keys())) == BATCH
    tier.proof = Proof.DONE
    tier.tick()
    async with asyncio.timeout(WAIT_S):
        while list(inner.keys()):
            await asyncio.wait([asyncio.get_running_loop().run_in_executor(None, int)])


async def test_a_status_says_what_stands(grounds: Grounds) -> None:
    """Numbers for a person and for scripts."""
    grounds.keep(BLOCKS)
    status = grounds.tier.status()

    assert status["num_values"] == 30
    assert status["breaker"] == "closed"
    assert status["answers"] is True
    assert status["queued_bytes"] == 0
