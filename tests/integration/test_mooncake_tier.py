"""The Mooncake tier against a real master: the contract, and memory shared with the client."""

import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from kvkeep.testing.tier_contract import (
    TierContract,
    block_key,
    in_parts,
    read,
    value_bytes,
    write,
)
from kvkeep.tiers.base import Tier
from kvkeep.tiers.mooncake.settings import REQUEST_BYTES_MAX
from kvkeep.tiers.mooncake.tier import MooncakeTier
from tests.servers.mooncake import MIB, MooncakeStore, mooncake_store, open_tier

Pooled = tuple[MooncakeTier, memoryview, int]
"""A tier, memory that it knows, and the inode of the file behind that."""


@pytest.fixture(scope="module")
def store() -> Iterator[MooncakeStore]:
    """One master with a storage process of its own."""
    with mooncake_store(1) as running:
        yield running


@pytest.fixture(scope="module")
def bare_store() -> Iterator[MooncakeStore]:
    """One master without storage."""
    with mooncake_store(0) as running:
        yield running


@pytest.fixture(scope="module")
def remote(store: MooncakeStore) -> Iterator[MooncakeTier]:
    """A tier whose values lie in somebody else's process; starting one takes a second."""
    tier = open_tier(store)
    yield tier
    tier.close()


@pytest.fixture(scope="module")
def offering(bare_store: MooncakeStore) -> Iterator[MooncakeTier]:
    """A tier whose values lie in memory that it offers to the store itself."""
    tier = open_tier(bare_store, segment_bytes=32 * MIB)
    yield tier
    tier.close()


def empty(tier: MooncakeTier) -> None:
    """Take away what the contract writes."""
    keys = [block_key(number) for number in range(64)]
    keys += [block_key(1, namespace=2), block_key(1, group_idx=1)]
    tier.delete([*keys, block_key(1, namespace=2, group_idx=7)])


class TestMooncakeTier(TierContract):
    @pytest.fixture
    def tier(self, remote: MooncakeTier) -> Iterator[Tier]:
        yield remote
        empty(remote)


class TestOwnSegment(TierContract):
    @pytest.fixture
    def tier(self, offering: MooncakeTier) -> Iterator[Tier]:
        yield offering
        empty(offering)


@pytest.fixture(scope="module")
def pooled(store: MooncakeStore) -> Iterator[Pooled]:
    """A tier that knows 8 MiB of a shared file, as the daemon's pool is."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(8 * MIB)
        inode = os.fstat(file.fileno()).st_ino
        memory = mmap.mmap(file.fileno(), 8 * MIB)
    tier = open_tier(store)
    with memory, memoryview(memory) as window, window[5000:] as region:
        tier.register(region)
        yield tier, region, inode
        tier.close()


def test_a_slot_with_a_header_comes_back(pooled: Pooled) -> None:
    """Parts in shared memory and beside it make one value, in both directions."""
    tier, pool, _ = pooled
    header, value = b"h" * 24, value_bytes(1, MIB - 24)
    pool[: len(value)] = value
    assert tier.write([block_key(1)], [[memoryview(header), pool[: len(value)]]]) == [True]
    head, target = bytearray(24), pool[4 * MIB : 4 * MIB + len(value)]

    assert tier.read([block_key(1)], [[memoryview(head), target]]) == [MIB]
    assert head == header
    assert target == value


def test_shared_memory_is_filled_by_the_client(pooled: Pooled) -> None:
    """What is in a region is not copied by this process: its client has the file mapped."""
    tier, _, inode = pooled
    (client_pid,) = tier.pids()

    assert f" {inode} " in Path(f"/proc/{client_pid}/maps").read_text()


def test_a_shorter_value_in_a_slot_keeps_its_length(pooled: Pooled) -> None:
    """Room of several pieces may be longer than the value, and the rest of it stays as it was."""
    tier, pool, _ = pooled
    assert tier.write([block_key(2)], [in_parts(value_bytes(2, 1000))]) == [True]
    head, slot = bytearray(24), pool[:2000]
    slot[:] = b"\x5a" * 2000

    assert tier.read([block_key(2)], [[memoryview(head), slot]]) == [1000]
    assert bytes(head) + bytes(slot[:976]) == value_bytes(2, 1000)
    assert slot[976:] == b"\x5a" * 1024


def test_a_large_batch_is_several_requests(store: MooncakeStore) -> None:
    """A batch of more than one request's bytes is kept and read whole."""
    tier = open_tier(store, value_bytes_max=16 * MIB)
    values = [Random(number).randbytes(12 * MIB) for number in range(4)]
    keys = [block_key(number) for number in range(4)]
    rooms = [bytearray(12 * MIB) for _ in values]
    assert 4 * 12 * MIB > REQUEST_BYTES_MAX

    written = tier.write(keys, [[memoryview(value)] for value in values])
    lengths = tier.read(keys, [[memoryview(room)] for room in rooms])
    tier.delete(keys)
    tier.close()

    assert written == [True] * 4
    assert lengths == [12 * MIB] * 4
    assert [bytes(room) for room in rooms] == values


def test_two_tiers_with_one_prefix_share(store: MooncakeStore) -> None:
    """What one host wrote the other reads; under another prefix there is nothing."""
    one, other = open_tier(store, prefix="shared/"), open_tier(store, prefix="shared/")
    stranger = open_tier(store, prefix="apart/")
    write(one, [1])

    assert read(other, [block_key(1)]) == [value_bytes(1)]
    assert read(stranger, [block_key(1)]) == [None]
    for tier in (one, other, stranger):
        tier.close()
