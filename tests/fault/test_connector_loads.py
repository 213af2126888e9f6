"""Loads of a rank from a pool that rots, is cut, or lends the slots to others."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from kvkeep.client.prefixes import PrefixClient
from kvkeep.core.effects import NO_SLOT
from kvkeep.model.ids import BlockHash
from kvkeep.tiers.slot_header import HEADER_BYTES
from tests.fault.ranks import HeldRank, held_rank
from tests.integration.daemons import (
    LAYOUT,
    Daemon,
    Vandal,
    Worker,
    acquire,
    hashes_of,
    opened_prefixes,
    running_daemon,
    wait_until,
)

HASHES = hashes_of(0, 4)
DAMAGED = 1


@dataclass
class Stocked:
    """A rank, what it stored, and a lease on it."""

    daemon: Daemon
    rank: HeldRank
    client: PrefixClient
    slots: tuple[int, ...]
    generation: int

    def vandal(self) -> Vandal:
        """Somebody with a hand in the pool."""
        pool = self.rank.attachment.pool
        assert pool is not None
        return Vandal(pool.view)

    def load(self) -> tuple[list[int], list[bytes]]:
        """Which blocks did not land, and which are corrupt."""
        return self.rank.load(HASHES, self.slots, generation=self.generation)


@pytest.fixture
def stocked() -> Iterator[Stocked]:
    """Four blocks in a pool, under a lease."""
    with (
        running_daemon() as daemon,
        held_rank(daemon) as rank,
        opened_prefixes(daemon) as client,
    ):
        rank.store(HASHES)
        lease = acquire(client, HASHES)
        assert lease is not None
        found = Stocked(daemon, rank, client, lease.slots, lease.generation)
        yield found
        # pytest keeps what a fixture gave a little longer, and with it the mapping of the pool.
        vars(found).clear()


def corrupt(*idxs: int) -> list[BlockHash]:
    """Hashes of these blocks."""
    return [HASHES[idx] for idx in idxs]


@pytest.mark.parametrize("part", ["header", "digests", "payload"])
def test_every_flipped_bit_is_found(stocked: Stocked, part: str) -> None:
    """A bit anywhere in a block's header, digests or bytes costs that block, and is reported.

    Behind a block whose header is wrong nothing is loaded: vLLM computes it anyway.
    """
    vandal = stocked.vandal()
    target = getattr(vandal, part)(stocked.slots[DAMAGED])
    num_bits = len(target) * 8
    rng = np.random.default_rng(7)
    bits = rng.choice(num_bits, 512, replace=False) if part == "payload" else range(num_bits)
    bad = [DAMAGED] if part == "payload" else [1, 2, 3]
    for bit_idx in bits:
        vandal.flip(target, int(bit_idx))
        assert stocked.load() == (bad, corrupt(DAMAGED)), f"bit {bit_idx} of the {part}"
        vandal.flip(target, int(bit_idx))

    assert stocked.load() == ([], [])


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("payload",), ([1, 2], corrupt(1, 2))),
        (("digests",), ([1, 2, 3], corrupt(1, 2))),
        (("header",), ([1, 2, 3], corrupt(1, 2))),
        (("digests", "payload"), ([1, 2, 3], corrupt(1, 2))),
        (("header", "digests", "payload"), ([1, 2, 3], corrupt(1, 2))),
    ],
    ids=lambda part: "+".join(part) if isinstance(part[0], str) else "",
)
def test_swapped_blocks_are_found(
    stocked: Stocked, parts: tuple[str, ...], expected: tuple[list[int], list[bytes]]
) -> None:
    """Two blocks that changed places, in part or as a whole, are both found."""
    vandal = stocked.vandal()
    for part in parts:
        take = getattr(vandal, part)
        vandal.swap(take(stocked.slots[1]), take(stocked.slots[2]))

    assert stocked.load() == expected


@pytest.mark.parametrize("kept", [0, 1, 4095, 5000])
def test_a_torn_block_is_found(stocked: Stocked, kept: int) -> None:
    """A block of which only the beginning was written is no block."""
    stocked.vandal().payload(stocked.slots[3])[kept:] = 0

    assert stocked.load() == ([3], corrupt(3))


def test_an_empty_header_is_found(stocked: Stocked) -> None:
    """A slot that was freed meanwhile gives nothing, though its bytes are still there."""
    vandal = stocked.vandal()
    vandal.header(stocked.slots[0])[:] = np.zeros(HEADER_BYTES, dtype=np.uint8)

    assert stocked.load() == ([0, 1, 2, 3], corrupt(0))


def test_a_pool_that_was_cut_gives_misses(stocked: Stocked) -> None:
    """Whatever cut the file, the engine does not die of it: nothing is loaded, nothing stored."""
    stocked.daemon.kill()
    os.truncate(stocked.daemon.pool, LAYOUT.block_bytes)

    assert stocked.load() == ([0, 1, 2, 3], [])
    stocked.rank.store(hashes_of(10, 2))
    assert stocked.load() == ([0, 1, 2, 3], [])


def test_slots_lent_to_other_blocks_give_misses(stocked: Stocked) -> None:
    """Once the lease is over others may be given the slots; whoever still loads finds out."""
    with Worker(stocked.daemon, engine_id="other") as other:
        lease = acquire(stocked.client, HASHES)
        assert lease is not None
        stocked.client.close()  # with both leases
        num_slots = stocked.daemon.gauge("slots")
        other.store(hashes_of(1000, num_slots))

    bad, _ = stocked.load()
    assert bad == [0, 1, 2, 3]


@pytest.mark.parametrize("slot", [NO_SLOT, 1 << 20])
def test_slots_that_do_not_exist_give_misses(stocked: Stocked, slot: int) -> None:
    """A number that names no slot, as a load bound to fail has, touches no memory."""
    slots = [*stocked.slots[:2], slot, stocked.slots[3]]

    assert stocked.rank.load(HASHES, slots) == ([0, 1, 2, 3], [])


def test_a_pool_formatted_for_others_gives_misses(stocked: Stocked) -> None:
    """A daemon that came back with an empty pool lends nothing that the old one held.

    And a rank that has met it takes nothing of an old lease for corrupt: the same blocks may lie
    well in other slots of the new pool.
    """
    stocked.daemon.kill()
    stocked.daemon.pool.unlink()
    stocked.daemon.start()
    with Worker(stocked.daemon, engine_id="other") as other:
        other.store(hashes_of(2000, 8))
        wait_until(lambda: stocked.rank.attachment.link.num_opened == 2, "the daemon is found")

        assert stocked.load() == ([0, 1, 2, 3], [])
