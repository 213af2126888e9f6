"""Copies from the pool to a tier in memory that breaks on request."""

from pathlib import Path

from kvkeep.core import events as on
from kvkeep.core.admission import AdmitReason
from kvkeep.tiers.faulty import TierFault
from kvkeep.tiers.io_queue import QueueLimits
from tests.unit.daemon.movement.grounds import ENGINE, WAIT_S, Grounds, keys

BLOCKS = keys(0, 20)


async def test_readable_blocks_are_copied_with_their_digests(grounds: Grounds) -> None:
    """All of them, and no pin stays."""
    grounds.store(BLOCKS)
    grounds.cascade.ready(BLOCKS)
    await grounds.drained()

    assert grounds.kept(BLOCKS) == len(BLOCKS)
    assert grounds.counts["blocks_cascaded"] == len(BLOCKS)
    grounds.assert_quiet()


async def test_a_block_that_rotted_in_the_pool_goes_nowhere(grounds: Grounds) -> None:
    """It is taken out of the pool as well; the others are copied."""
    grounds.store(BLOCKS)
    slot = grounds.node.ledger.find(BLOCKS[3])
    assert slot is not None
    grounds.view.payload(slot.idx)[7] ^= 1
    grounds.cascade.ready(BLOCKS)
    await grounds.drained()

    assert grounds.kept(BLOCKS) == len(BLOCKS) - 1
    assert grounds.node.ledger.find(BLOCKS[3]) is None
    grounds.assert_quiet()


async def test_a_block_used_while_it_is_copied_is_copied_once(grounds: Grounds) -> None:
    """Whether it is on its way or still waits."""
    grounds.medium.chances = {TierFault.HANG: 1.0}
    grounds.store(BLOCKS)
    for _ in range(3):
        grounds.cascade.ready(BLOCKS)
    await grounds.hanging()
    grounds.cascade.ready(BLOCKS)
    grounds.medium.release()
    await grounds.drained()

    assert grounds.counts["blocks_cascaded"] == len(BLOCKS)
    assert grounds.tier.admission.num_by_reason[AdmitReason.PROVEN] == 0


async def test_blocks_that_are_gone_before_their_turn_are_counted(grounds: Grounds) -> None:
    """And what admission booked for them is given back."""
    many = keys(0, 400)
    grounds.store(many)
    grounds.medium.chances = {TierFault.HANG: 1.0}
    grounds.cascade.ready(many)
    num_waiting = grounds.cascade.num_waiting
    assert num_waiting
    await grounds.hanging()
    grounds.clear()
    grounds.medium.release()
    await grounds.drained()

    assert grounds.counts["cascades_too_late"] == num_waiting
    held_bytes = grounds.tier.admission.probation_bytes
    assert held_bytes == (len(many) - num_waiting) * grounds.value_bytes
    grounds.assert_quiet()


async def test_a_failing_tier_costs_counts_only(grounds: Grounds) -> None:
    """The blocks stay readable, no pin is left, and admission holds nothing for them."""
    grounds.medium.chances = {TierFault.IO_ERROR: 1.0}
    grounds.store(BLOCKS)
    grounds.cascade.ready(BLOCKS)
    await grounds.drained()

    assert grounds.counts["cascades_refused"] > 0
    assert grounds.num_right(BLOCKS) == len(BLOCKS)
    assert grounds.tier.admission.probation_bytes == 0
    grounds.assert_quiet()


async def test_a_small_queue_takes_small_batches(tmp_path: Path) -> None:
    """A batch that never fits would be refused for ever."""
    grounds = Grounds(tmp_path, limits=QueueLimits(queue_bytes_max=4 * 2200))
    grounds.store(BLOCKS)
    grounds.cascade.ready(BLOCKS)
    await grounds.drained()

    assert grounds.counts["cascades_refused"] == 0
    assert grounds.kept(BLOCKS) == len(BLOCKS)
    grounds.close()


async def test_a_stopped_cascade_begins_nothing(grounds: Grounds) -> None:
    """What moves comes to its end, what waits is dropped, what comes is not heard."""
    grounds.medium.chances = {TierFault.HANG: 1.0}
    many = keys(0, 400)
    grounds.store(many)
    grounds.cascade.ready(many)
    await grounds.hanging()
    grounds.cascade.stop()
    grounds.cascade.ready(keys(1000, 5))
    assert grounds.cascade.num_waiting == 0
    grounds.medium.release()
    await grounds.cascade.drain(WAIT_S)

    assert 0 < grounds.counts["blocks_cascaded"] < len(many)
    grounds.assert_quiet()


async def test_what_hangs_at_the_end_changes_nothing_any_more(grounds: Grounds) -> None:
    """The pool may be another daemon's when the call returns."""
    grounds.medium.chances = {TierFault.HANG: 1.0}
    grounds.store(BLOCKS[:1])
    grounds.cascade.ready(BLOCKS[:1])
    await grounds.hanging()
    grounds.cascade.abandon()
    grounds.medium.release()
    await grounds.drained()

    assert len(grounds.node.reads) == 1
    grounds.shell.handle(on.HolderLeft(ENGINE))
