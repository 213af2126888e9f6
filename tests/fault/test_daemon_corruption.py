"""Damage planted in the pool behind everybody's back: a reader finds all of it.

The reader does what ``connector/worker`` does: digests first, then headers, then bytes with their
digests. A block may be lost to damage; a wrong byte may not arrive.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvkeep.client.prefixes import PrefixClient
from kvkeep.model.errors import UnavailableError
from kvkeep.model.ids import BlockHash
from kvkeep.tiers.shared_memory import PoolView
from kvkeep.tiers.slot_header import CHECK_BYTES, HEADER_BYTES
from tests.integration.daemons import (
    LAYOUT,
    Daemon,
    Vandal,
    Worker,
    acquire,
    hashes_of,
    load_right_or_not_at_all,
    opened_prefixes,
    running_daemon,
)

NUM_BLOCKS = 8
HEADER_BITS = HEADER_BYTES * 8
DIGEST_BITS = LAYOUT.num_pages * 16 * 8
PAYLOAD_BITS = LAYOUT.block_bytes * 8


@dataclass
class Stage:
    """Stored blocks, someone who reads them, and someone who damages them."""

    daemon: Daemon
    worker: Worker
    client: PrefixClient
    vandal: Vandal
    hashes: list[BlockHash]
    slots: tuple[int, ...]

    def is_loadable(self, number: int = 0) -> bool:
        """Whether a block arrives; if it does, with its own bytes."""
        block_hash = self.hashes[number]
        return load_right_or_not_at_all(self.worker, self.client, [block_hash]) == 1


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """A daemon with a few blocks, the same for every test: damage is undone."""
    hashes = hashes_of(0, NUM_BLOCKS)
    with (
        running_daemon() as daemon,
        Worker(daemon) as worker,
        opened_prefixes(daemon) as client,
    ):
        worker.store(hashes)
        lease = acquire(client, hashes)
        assert lease is not None
        client.release([lease])
        made = Stage(daemon, worker, client, Vandal(worker.view), hashes, lease.slots)
        yield made
        # The fixture's value lives longer than the module's check for leaks.
        del worker.view, made.vandal


@pytest.fixture(autouse=True)
def _undone(stage: Stage) -> Iterator[None]:
    """After each test every block is whole again, so that the next one tests its own damage."""
    yield
    assert all(stage.is_loadable(number) for number in range(NUM_BLOCKS))


def test_every_bit_of_a_header_counts(stage: Stage) -> None:
    """Exhaustive: no bit of the 128 bytes can turn over and leave the block readable."""
    header = stage.vandal.header(stage.slots[0])
    unnoticed = []
    for bit_idx in range(HEADER_BITS):
        stage.vandal.flip(header, bit_idx)
        if stage.is_loadable():
            unnoticed.append(bit_idx)
        stage.vandal.flip(header, bit_idx)

    assert unnoticed == []


def test_every_bit_of_the_digests_counts(stage: Stage) -> None:
    """Exhaustive over the digests of one block."""
    digests = stage.vandal.digests(stage.slots[0])
    unnoticed = []
    for bit_idx in range(DIGEST_BITS):
        stage.vandal.flip(digests, bit_idx)
        if stage.is_loadable():
            unnoticed.append(bit_idx)
        stage.vandal.flip(digests, bit_idx)

    assert unnoticed == []


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    number=st.integers(0, NUM_BLOCKS - 1),
    bits=st.sets(st.integers(0, PAYLOAD_BITS - 1), min_size=1, max_size=3),
)
def test_any_bits_of_the_bytes_count(stage: Stage, number: int, bits: set[int]) -> None:
    """One to three bits anywhere in the bytes of any block."""
    payload = stage.vandal.payload(stage.slots[number])
    for bit_idx in bits:
        stage.vandal.flip(payload, bit_idx)
    is_loadable = stage.is_loadable(number)
    for bit_idx in bits:
        stage.vandal.flip(payload, bit_idx)

    assert not is_loadable


PARTS = ("header", "digests", "payload")
SWAPS = [
    ("header",),
    ("digests",),
    ("payload",),
    ("header", "digests"),
    ("header", "payload"),
    ("digests", "payload"),
    ("header", "digests", "payload"),
]


def swap(stage: Stage, parts: tuple[str, ...], one: int, other: int) -> None:
    """Exchange parts of two slots."""
    for part in parts:
        find = getattr(stage.vandal, part)
        stage.vandal.swap(find(stage.slots[one]), find(stage.slots[other]))


@pytest.mark.parametrize("parts", SWAPS, ids="+".join)
def test_swapped_blocks_are_found(stage: Stage, parts: tuple[str, ...]) -> None:
    """Whatever of two blocks is exchanged, neither arrives in the other's place."""
    swap(stage, parts, 0, 1)
    loadable = [stage.is_loadable(0), stage.is_loadable(1)]
    swap(stage, parts, 0, 1)

    assert loadable == [False, False]


def test_swapped_pages_of_one_block_are_found(stage: Stage) -> None:
    """Two head pages in each other's place, with their digests and without."""
    size, slot = LAYOUT.page_bytes, stage.slots[0]
    pages, digests = stage.vandal.payload(slot), stage.vandal.digests(slot)
    places = [(pages[:size], pages[size : 2 * size]), (digests[:16], digests[16:32])]
    loadable = []
    for num_parts in (1, 2):
        for one, other in places[:num_parts]:
            stage.vandal.swap(one, other)
        loadable.append(stage.is_loadable())
        for one, other in places[:num_parts]:
            stage.vandal.swap(one, other)

    assert loadable == [False, False]


def test_a_block_that_says_it_is_shorter_is_not_read(stage: Stage) -> None:
    """A header may be right in itself and still not describe a whole block."""
    header = stage.vandal.header(stage.slots[0])
    before = header.copy()
    header[32:40] = list(struct.pack("<Q", LAYOUT.block_bytes // 2))
    covered = header[CHECK_BYTES:].tobytes() + stage.vandal.digests(stage.slots[0]).tobytes()
    header[:CHECK_BYTES] = list(struct.pack("<Q", xxhash.xxh3_64_intdigest(covered)))
    is_loadable = stage.is_loadable()
    header[:] = before

    assert not is_loadable


@pytest.mark.parametrize("num_bytes", [1, LAYOUT.page_bytes, LAYOUT.block_bytes])
def test_a_tail_of_zeros_is_found(stage: Stage, num_bytes: int) -> None:
    """What a write cut short leaves."""
    payload = stage.vandal.payload(stage.slots[0])
    before = payload.copy()
    payload[-num_bytes:] = 0
    payload[-1] ^= before[-1] == 0
    is_loadable = stage.is_loadable()
    payload[:] = before

    assert not is_loadable


def test_the_files_end_cut_off_is_noticed_before_it_is_touched(stage: Stage) -> None:
    """Nothing is loaded from a mapping whose file has become shorter."""
    path, view = stage.daemon.pool, stage.worker.view
    size = path.stat().st_size
    os.truncate(path, view.geometry.payload_offset + 100 * LAYOUT.block_bytes)
    is_loadable = stage.is_loadable()
    with pytest.raises(UnavailableError):
        PoolView.open(str(path), view.pool_id)
    os.truncate(path, size)

    assert not is_loadable


def test_all_damage_at_once_survives_no_restart() -> None:
    """A new daemon drops every damaged block, keeps all others, and never lends a wrong byte.

    One block for each bit of a header, for each swap, and for a sample of other bits.
    """
    num_damaged = HEADER_BITS + 2 * len(SWAPS) + 64
    hashes = hashes_of(0, num_damaged + 50)
    with running_daemon(pool_bytes=32 << 20) as daemon:
        with Worker(daemon) as worker, opened_prefixes(daemon) as client:
            worker.store(hashes)
            lease = acquire(client, hashes)
            assert lease is not None
            assert len(lease.slots) == len(hashes)
            vandal = Vandal(worker.view)
            _damage(Stage(daemon, worker, client, vandal, hashes, lease.slots))
            daemon.kill()
        daemon.start()

        # Two whole slots in each other's place are two whole blocks.
        num_whole = 50 + 2
        assert daemon.counter("blocks_recovered") == num_whole
        assert daemon.counter("blocks_dropped") == len(hashes) - num_whole
        with Worker(daemon) as worker, opened_prefixes(daemon) as client:
            assert load_right_or_not_at_all(worker, client, hashes) == num_whole
            assert load_right_or_not_at_all(worker, client, hashes[-50:]) == 50


def _damage(stage: Stage) -> None:
    """Damage every block but the last fifty."""
    vandal, slots = stage.vandal, stage.slots
    for bit_idx in range(HEADER_BITS):
        vandal.flip(vandal.header(slots[bit_idx]), bit_idx)
    first = HEADER_BITS
    for parts in SWAPS:
        swap(stage, parts, first, first + 1)
        first += 2
    for sample in range(32):
        vandal.flip(vandal.digests(slots[first + sample]), sample * DIGEST_BITS // 32)
        vandal.flip(vandal.payload(slots[first + 32 + sample]), sample * PAYLOAD_BITS // 32)
