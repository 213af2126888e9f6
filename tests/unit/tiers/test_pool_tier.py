"""A pool file and its ledger behind the seam of the tiers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.model.errors import InputError, RefusedError
from kvkeep.model.layout import PAGE_BYTES_MAX
from kvkeep.testing.tier_contract import block_key, in_parts, read, value_bytes, write
from kvkeep.tiers.base import Tier
from kvkeep.tiers.pool_tier import SharedMemoryTier, pool_layout

LENGTH = 600_000
POOL_BYTES = 6 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the pool is."""
    return tmp_path / "pool"


@pytest.fixture
def tier(path: Path) -> Iterator[SharedMemoryTier]:
    """Six slots."""
    tier = SharedMemoryTier(path, POOL_BYTES, LENGTH)
    yield tier
    tier.close()


def found_of(tier: Tier, count: int) -> list[int]:
    """The numbers below ``count`` whose value is there, and right."""
    found = read(tier, [block_key(number) for number in range(count)], LENGTH)
    assert all(value in (None, value_bytes(n, LENGTH)) for n, value in enumerate(found))
    return [number for number, value in enumerate(found) if value is not None]


def test_the_least_recently_used_goes_first(tier: SharedMemoryTier) -> None:
    """A pool is always full, and what was read lately stays."""
    num_slots = tier.use().capacity_bytes // (LENGTH + 8)  # type: ignore[operator]
    write(tier, range(num_slots), LENGTH)
    read(tier, [block_key(0)], LENGTH)

    assert write(tier, [num_slots], LENGTH) == [True]
    assert found_of(tier, num_slots + 1) == [0, *range(2, num_slots + 1)]


def test_a_rotten_slot_is_a_miss(tier: SharedMemoryTier, path: Path) -> None:
    """A byte that changed in the file is found by its digest, and the block is forgotten."""
    write(tier, [1, 2], LENGTH)
    whole = path.read_bytes()
    at = whole.index(value_bytes(1, LENGTH)[100_000:100_032])
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\0")

    assert found_of(tier, 3) == [2]
    assert tier.lookup([block_key(1), block_key(2)]) == [False, True]
    assert write(tier, [1], LENGTH) == [True]
    assert found_of(tier, 3) == [1, 2]


def test_a_value_too_long_is_declined(tier: SharedMemoryTier) -> None:
    """A slot has one size."""
    assert write(tier, [1], LENGTH + 1) == [False]
    assert tier.use().num_values == 0


def test_nothing_is_lent_for_ever(tier: SharedMemoryTier) -> None:
    """After any use every lease is back, and the ledger holds together."""
    write(tier, range(9), LENGTH)
    read(tier, [block_key(n) for n in range(9)], LENGTH)
    read(tier, [block_key(8)], 10)
    tier.delete([block_key(8), block_key(99)])

    tier._node.check()
    assert len(tier._node.reads) == len(tier._node.writes) == 0


def test_a_reader_keeps_its_slot(tier: SharedMemoryTier) -> None:
    """A value deleted while it is read stays whole for that reader, and is found by no other."""
    write(tier, [1], LENGTH)

    class Room(list[memoryview]):
        """Deletes the value when the copy into it begins."""

        def __iter__(self) -> Iterator[memoryview]:
            tier.delete([block_key(1)])
            write(tier, [2, 3, 4, 5, 6, 7, 8, 9], LENGTH)
            return super().__iter__()

    memory = bytearray(LENGTH)
    assert tier.read([block_key(1)], [Room(in_parts(memory))]) == [LENGTH]
    assert memory == value_bytes(1, LENGTH)
    assert tier.lookup([block_key(1)]) == [False]


def test_a_pool_that_is_held_is_refused(tier: SharedMemoryTier, path: Path) -> None:
    """Two owners would overwrite each other's headers."""
    with pytest.raises(RefusedError, match="another daemon holds"):
        SharedMemoryTier(path, POOL_BYTES, LENGTH)
    with pytest.raises(InputError, match="holds no two blocks"):
        SharedMemoryTier(path.with_name("small"), 3 << 20, 1 << 20)


def test_the_file_goes_with_the_tier(path: Path) -> None:
    """What is left would be shared memory that nobody uses."""
    SharedMemoryTier(path, POOL_BYTES, LENGTH).close()

    assert not path.exists()


@pytest.mark.parametrize("value_bytes_max", [1, LENGTH, PAGE_BYTES_MAX, 3 * PAGE_BYTES_MAX])
def test_a_slot_holds_the_longest_value(value_bytes_max: int) -> None:
    """With its length, in pages no larger than allowed."""
    layout = pool_layout(value_bytes_max)

    assert layout.block_bytes >= value_bytes_max + 8
    assert layout.page_bytes <= PAGE_BYTES_MAX
