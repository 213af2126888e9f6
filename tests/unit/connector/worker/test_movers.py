"""Blocks between an engine's memory and a pool: bit for bit, between any numbers of ranks."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kvkeep.connector.worker.movers import HostMover, rank_digests
from kvkeep.connector.worker.views import EngineMemory
from tests.unit.connector.worker.memories import (
    Pool,
    fill,
    is_equal,
    make_layout,
    make_memory,
    make_tensors,
)

HEADS = 2
SLOTS = [5, 1, 4]
STORED = [2, 7, 3]
LOADED = [6, 1, 5]


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    """A pool for blocks of two heads."""
    found = Pool(tmp_path, make_layout(HEADS))
    yield found
    found.close()


def make_ranks(
    tp_size: int, *, is_one_buffer: bool = True, num_heads: int = HEADS
) -> list[EngineMemory]:
    """The ranks of an engine, zeroed."""
    local = max(1, num_heads // tp_size)
    return [
        make_memory(
            make_tensors(local, is_one_buffer=is_one_buffer),
            make_layout(num_heads),
            tp_rank=rank,
            tp_size=tp_size,
        )
        for rank in range(tp_size)
    ]


def whole(ranks: list[EngineMemory], block: int) -> torch.Tensor:
    """A block with the heads of all ranks that store: ``[layers, heads, tokens, content]``."""
    parts = [
        torch.stack([tensor[block] for tensor in rank.tensors]) for rank in ranks if rank.is_writer
    ]
    return torch.cat(parts, dim=1)


def store(ranks: list[EngineMemory], pool: Pool) -> None:
    """Fill every rank and have those that store do it."""
    for seed, rank in enumerate(ranks):
        fill({str(idx): tensor for idx, tensor in enumerate(rank.tensors)}, seed)
        if rank.is_writer:
            HostMover(rank, 1).store(pool.view, STORED, SLOTS, None)


def load(rank: EngineMemory, pool: Pool, num_threads: int = 0) -> list[bool]:
    """Which blocks landed in a rank."""
    digests = rank_digests(pool.view, SLOTS, rank)
    landed = HostMover(rank, num_threads).load(pool.view, SLOTS, LOADED, digests)
    return [bool(ok) for ok in landed]


@pytest.mark.parametrize("stored_by", [1, 2, 4])
@pytest.mark.parametrize("loaded_by", [1, 2, 4])
@pytest.mark.parametrize("is_one_buffer", [True, False])
def test_blocks_come_back_bit_for_bit(
    pool: Pool, stored_by: int, loaded_by: int, is_one_buffer: bool
) -> None:
    """What any number of ranks stored, any other number loads, each its own heads."""
    source = make_ranks(stored_by, is_one_buffer=is_one_buffer)
    target = make_ranks(loaded_by, is_one_buffer=is_one_buffer)
    store(source, pool)

    assert [load(rank, pool) for rank in target] == [[True] * 3] * loaded_by
    for stored, loaded in zip(STORED, LOADED, strict=True):
        expected = whole(source, stored)
        assert is_equal(whole(target, loaded), expected)
    for rank in target:
        untouched = [block for block in range(8) if block not in LOADED]
        assert not any(tensor[untouched].any() for tensor in rank.tensors)


@pytest.mark.parametrize(
    ("stored_by", "loaded_by"), [(1, 3), (3, 1), (2, 3), (3, 2), (6, 2), (2, 12), (12, 3)]
)
def test_sizes_need_not_divide_each_other(tmp_path: Path, stored_by: int, loaded_by: int) -> None:
    """Six heads: every rank loads its own, whichever ranks had stored them."""
    source = make_ranks(stored_by, num_heads=6)
    target = make_ranks(loaded_by, num_heads=6)
    with contextlib.closing(Pool(tmp_path, make_layout(6))) as pool:
        store(source, pool)
        landed = [load(rank, pool) for rank in target]

    assert landed == [[True] * 3] * loaded_by
    for stored, loaded in zip(STORED, LOADED, strict=True):
        assert is_equal(whole(target, loaded), whole(source, stored))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_bad_page_makes_its_block_bad_and_no_other(pool: Pool, num_threads: int) -> None:
    """One flipped bit anywhere in a block is found, and its neighbors land."""
    store(make_ranks(1), pool)
    payload = pool.view.payload(SLOTS[1])
    for offset in np.linspace(0, len(payload) - 1, 13, dtype=int):
        payload[offset] ^= 1 << (offset % 8)
        (rank,) = make_ranks(1)
        assert load(rank, pool, num_threads) == [True, False, True]
        payload[offset] ^= 1 << (offset % 8)
    (rank,) = make_ranks(1)
    assert load(rank, pool, num_threads) == [True] * 3


def test_a_rank_finds_what_is_wrong_in_its_own_heads(pool: Pool) -> None:
    """A bit flipped in another rank's head is that rank's to find."""
    store(make_ranks(1), pool)
    page_bytes = make_layout().page_bytes
    pool.view.payload(SLOTS[0])[page_bytes + 9] ^= 4  # layer 0, head 1

    assert [load(rank, pool) for rank in make_ranks(2)] == [[True] * 3, [False, True, True]]


def test_swapped_slots_are_found(pool: Pool) -> None:
    """Two blocks that changed places match no digest."""
    store(make_ranks(1), pool)
    one, other = pool.view.payload(SLOTS[0]), pool.view.payload(SLOTS[1])
    before = one.copy()
    one[:] = other
    other[:] = before

    (rank,) = make_ranks(1)
    assert load(rank, pool) == [False, False, True]
