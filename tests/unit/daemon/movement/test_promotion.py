"""Copies from a tier in memory that breaks on request into the pool."""

import asyncio
from pathlib import Path

import pytest

from kvkeep.core.blocks import BlockState
from kvkeep.tiers.faulty import TierFault
from kvkeep.tiers.io_queue import QueueLimits
from tests.unit.daemon.movement.grounds import NAMESPACE, WAIT_S, Grounds, keys, wanted

COUNT = 20
BLOCKS = keys(0, COUNT)
WANTED = wanted(0, COUNT)


def ignore(_wait_s: float) -> None:
    """An asker who needs no announcement."""


def bringing(grounds: Grounds, announce: object = ignore) -> "asyncio.Task[None]":
    """One who asks."""
    work = grounds.promotion.bring(WANTED, announce)  # type: ignore[arg-type]
    return asyncio.get_running_loop().create_task(work)


async def test_a_prefix_comes_with_its_bytes(grounds: Grounds) -> None:
    """It is announced, and nothing is left behind."""
    grounds.keep(BLOCKS)
    announced: list[float] = []
    await grounds.promotion.bring(WANTED, announced.append)

    assert grounds.num_right(BLOCKS) == COUNT
    assert announced
    assert min(announced) > 0
    assert grounds.counts["promotions_failed"] == 0
    grounds.assert_quiet()


async def test_a_head_in_the_pool_is_not_read_again(grounds: Grounds) -> None:
    """Only the tail is, and the head stays while it comes."""
    grounds.keep(BLOCKS)
    grounds.store(BLOCKS[:8])
    held = grounds.promotion.hold(WANTED, 8)
    assert held
    await grounds.promotion.bring(WANTED, ignore)
    grounds.promotion.let_go(held)

    assert grounds.node.counters["blocks_promoted"] == COUNT - 8
    assert grounds.num_right(BLOCKS) == COUNT
    grounds.assert_quiet()


async def test_all_who_ask_wait_for_one_read_and_are_told_how_long(grounds: Grounds) -> None:
    """The second one is announced as long a wait as the first."""
    grounds.keep(BLOCKS)
    grounds.medium.chances = {TierFault.HANG: 1.0}
    first: list[float] = []
    second: list[float] = []
    one = bringing(grounds, first.append)
    await grounds.hanging()
    other = bringing(grounds, second.append)
    await asyncio.sleep(0)
    grounds.medium.release()
    await asyncio.wait_for(asyncio.gather(one, other), WAIT_S)

    assert grounds.node.counters["blocks_promoted"] == COUNT
    assert second[0] == pytest.approx(first[0], abs=2.0)
    grounds.assert_quiet()


async def test_who_leaves_does_not_end_the_read(grounds: Grounds) -> None:
    """Its memory is in use until the call returns; the blocks are there for the next."""
    grounds.keep(BLOCKS)
    grounds.medium.chances = {TierFault.HANG: 1.0}
    task = bringing(grounds)
    await grounds.hanging()
    task.cancel()
    await asyncio.wait([task])
    assert grounds.node.ledger.num_by_state[BlockState.WRITING] == COUNT
    grounds.medium.release()
    await grounds.drained()

    assert grounds.num_right(BLOCKS) == COUNT
    grounds.assert_quiet()


async def test_a_clear_in_the_middle_leaves_nothing(grounds: Grounds) -> None:
    """What arrives after it is not lent; the slots are free."""
    grounds.keep(BLOCKS)
    grounds.medium.chances = {TierFault.HANG: 1.0}
    task = bringing(grounds)
    await grounds.hanging()
    grounds.clear()
    assert grounds.node.ledger.num_by_state[BlockState.FENCED] == COUNT
    grounds.medium.release()
    await asyncio.wait_for(task, WAIT_S)
    await grounds.drained()

    assert grounds.node.ledger.num_by_state[BlockState.FENCED] == 0
    grounds.assert_quiet()


@pytest.mark.parametrize("fault", [TierFault.IO_ERROR, TierFault.CUT, TierFault.TRUNCATION])
async def test_what_can_not_be_read_is_free_again(grounds: Grounds, fault: TierFault) -> None:
    """No part of a value is ever readable, and who asks is answered."""
    grounds.keep(BLOCKS)
    grounds.medium.chances = {fault: 1.0}
    await asyncio.wait_for(grounds.promotion.bring(WANTED, ignore), WAIT_S)

    assert grounds.num_right(BLOCKS) == 0
    assert grounds.counts["promotions_failed"] >= COUNT
    grounds.assert_quiet()


async def test_a_prefix_larger_than_the_queue_comes_whole(tmp_path: Path) -> None:
    """Reads wait for one another instead of being refused."""
    grounds = Grounds(tmp_path, limits=QueueLimits(queue_bytes_max=4 * 2200))
    grounds.keep(BLOCKS)
    await grounds.promotion.bring(WANTED, ignore)

    assert grounds.num_right(BLOCKS) == COUNT
    assert grounds.counts["promotions_failed"] == 0
    grounds.close()


async def test_a_pool_without_room_is_a_miss(grounds: Grounds) -> None:
    """While every slot is being written by engines, nobody waits."""
    grounds.keep(BLOCKS)
    everything = keys(1000, len(grounds.node.ledger.slots))
    assert grounds.reserve(everything).lease_id
    await asyncio.wait_for(grounds.promotion.bring(WANTED, ignore), WAIT_S)

    assert grounds.num_right(BLOCKS) == 0


async def test_another_tenants_blocks_do_not_come(grounds: Grounds) -> None:
    """The same hashes under another namespace are other blocks."""
    grounds.keep(BLOCKS)
    stranger = type(WANTED)(type(NAMESPACE)(b"m" * 32), 0, WANTED.hashes, 0.0)
    await grounds.promotion.bring(stranger, ignore)

    assert grounds.node.counters["blocks_promoted"] == 0
    assert grounds.num_right(BLOCKS) == 0


async def test_a_stopped_promotion_begins_nothing(grounds: Grounds) -> None:
    """Neither for new questions nor for those under way."""
    grounds.keep(BLOCKS)
    task = bringing(grounds)
    grounds.promotion.stop()
    await asyncio.wait_for(task, WAIT_S)

    assert not grounds.promotion.may_come(WANTED, 0)
    assert grounds.node.counters["blocks_promoted"] == 0
    grounds.assert_quiet()


async def test_slots_of_a_read_that_hangs_at_the_end_stay_marked(grounds: Grounds) -> None:
    """The next daemon then waits for this process, as it may still write."""
    grounds.keep(BLOCKS)
    grounds.medium.chances = {TierFault.HANG: 1.0}
    task = bringing(grounds)
    await grounds.hanging()
    grounds.promotion.abandon()
    task.cancel()
    grounds.medium.release()
    await grounds.drained()

    assert grounds.node.ledger.num_by_state[BlockState.WRITING] == COUNT
