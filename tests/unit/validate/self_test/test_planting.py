"""Faults lie where they were put, on the side of verification where they were put."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvkeep.model.ids import HASH_BYTES, BlockHash, BlockKey, Namespace
from kvkeep.tiers.shared_memory import PoolFile, PoolView
from kvkeep.tiers.slot_header import DIGEST_BYTES, SlotState
from kvkeep.transfer.host_copy import open_copier
from kvkeep.validate.self_test.planting import PlantedPool
from kvkeep.validate.self_test.small_model import LAYOUT

KEY = BlockKey(Namespace(b"n" * HASH_BYTES), BlockHash(b"h" * HASH_BYTES))
OTHER = BlockKey(KEY.namespace, BlockHash(b"o" * HASH_BYTES))
SLOT = 3


@pytest.fixture
def file(tmp_path: Path) -> Iterator[PoolFile]:
    """A pool with one block."""
    made = PoolFile.open(tmp_path / "pool", 4 << 20)
    made.format(LAYOUT)
    view = made.view()
    view.payload(SLOT)[:] = np.random.default_rng(1).integers(0, 256, LAYOUT.block_bytes)
    view.digests[SLOT] = digests_of(view)
    made.mark(SLOT, SlotState.READY, KEY)
    del view  # a window keeps the mapping open
    yield made
    made.close()


def addresses_of(view: PoolView) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    slots = np.array([SLOT], dtype=np.int64)
    return view.page_addresses(slots, 0, LAYOUT.num_heads).reshape(-1)


def digests_of(view: PoolView) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    found = np.empty((LAYOUT.num_pages, DIGEST_BYTES), dtype=np.uint8)
    open_copier().digest(addresses_of(view), LAYOUT.page_bytes, found)
    return found.reshape(LAYOUT.num_layers, LAYOUT.num_heads, DIGEST_BYTES)


def verifies(view: PoolView) -> bool:
    """What a worker asks: is the header this block's, and do all bytes match their digests."""
    slots = np.array([SLOT], dtype=np.int64)
    is_named = bool(view.readable(slots, KEY.namespace, 0, [KEY.block_hash])[0])
    return is_named and np.array_equal(digests_of(view), view.digests[SLOT])


def test_blocks_are_found_by_key(file: PoolFile) -> None:
    """With the slot they lie in."""
    assert PlantedPool(file.view()).slots() == {KEY: SLOT}


@pytest.mark.parametrize("has_digests", [False, True])
def test_below_verification_it_is_refused(file: PoolFile, has_digests: bool) -> None:
    """Wrong bytes, also those that come with digests of their own."""
    pool = PlantedPool(file.view())
    wrong = np.zeros_like(pool.block(SLOT))

    pool.plant(SLOT, wrong, is_sealed=False, has_digests=has_digests)

    assert not verifies(file.view())


def test_behind_verification_it_is_believed(file: PoolFile) -> None:
    """Header, digests and bytes fit each other, and the bytes are wrong."""
    pool = PlantedPool(file.view())
    wrong = np.zeros_like(pool.block(SLOT))

    pool.plant(SLOT, wrong, is_sealed=True, has_digests=False)

    assert verifies(file.view())
    assert not pool.block(SLOT).any()
    assert pool.slots() == {KEY: SLOT}


@pytest.mark.parametrize("is_sealed", [False, True])
def test_healed_is_as_it_was(file: PoolFile, is_sealed: bool) -> None:
    """Every byte of header, digests and block."""
    pool, before = PlantedPool(file.view()), bytes(file.view().region)
    pool.plant(SLOT, np.zeros_like(pool.block(SLOT)), is_sealed=is_sealed, has_digests=True)
    assert bytes(file.view().region) != before

    pool.heal()

    assert bytes(file.view().region) == before


def test_a_slot_that_has_another_block_by_now_is_left_alone(file: PoolFile) -> None:
    """What was stored since is not overwritten by what lay there before."""
    pool = PlantedPool(file.view())
    pool.plant(SLOT, np.zeros_like(pool.block(SLOT)), is_sealed=False, has_digests=False)
    file.view().payload(SLOT)[:] = 7
    file.view().digests[SLOT] = digests_of(file.view())
    file.mark(SLOT, SlotState.READY, OTHER)

    pool.heal()

    assert set(file.view().payload(SLOT)) == {7}
    assert pool.slots() == {OTHER: SLOT}


def test_a_pool_is_opened_by_its_path(file: PoolFile) -> None:
    """As another process opens it."""
    assert PlantedPool.open(str(file.path)).slots() == {KEY: SLOT}
