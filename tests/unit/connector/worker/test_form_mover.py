"""Blocks between an engine and a pool that keeps them in 8 bits: near, found bad, or left alone."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kvkeep.connector.identity import stored_layout
from kvkeep.connector.worker import form_mover
from kvkeep.connector.worker.form_mover import FormMover
from kvkeep.connector.worker.movers import HostMover, rank_digests
from kvkeep.connector.worker.views import EngineMemory
from kvkeep.transfer.int8_form import STEPS, Int8Form
from tests.unit.connector.worker.memories import (
    NUM_BLOCKS,
    Pool,
    is_equal,
    make_layout,
    make_memory,
    make_tensors,
)

HEADS = 2
SLOTS = [5, 1, 4]
STORED = [2, 7, 3]
LOADED = [6, 1, 5]
LAYOUT = make_layout(HEADS)
FORM = Int8Form(LAYOUT.dtype, LAYOUT.page_bytes)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    """A pool for blocks of two heads in 8 bits."""
    found = Pool(tmp_path, stored_layout(LAYOUT, FORM))
    yield found
    found.close()


@pytest.fixture(autouse=True, params=[1, 2, 100], ids="{}-blocks-at-once".format)
def batch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one block, of some, and of more than there are."""
    monkeypatch.setattr(form_mover, "BATCH_BYTES", request.param * HEADS * LAYOUT.page_bytes)


def make_ranks(tp_size: int, *, seed: int | None = None, one_buffer: bool = True) -> list[
    EngineMemory
]:  # fmt: skip
    """The ranks of an engine, filled with 7, or with numbers of their own."""
    ranks = []
    for rank in range(tp_size):
        tensors = make_tensors(HEADS // tp_size, is_one_buffer=one_buffer)
        generator = torch.Generator().manual_seed((seed or 0) * 10 + rank)
        for tensor in tensors.values():
            tensor.fill_(7)
            if seed is not None:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        ranks.append(make_memory(tensors, LAYOUT, tp_rank=rank, tp_size=tp_size))
    return ranks


def whole(ranks: list[EngineMemory], block: int) -> torch.Tensor:
    """A block with the heads of all ranks: ``[layers, heads, tokens, content]``."""
    parts = [torch.stack([tensor[block] for tensor in rank.tensors]) for rank in ranks]
    return torch.cat(parts, dim=1)


def store(ranks: list[EngineMemory], pool: Pool) -> list[list[bool]]:
    """Which blocks each rank stored."""
    return [FormMover(r, FORM).store(pool.view, STORED, SLOTS, None).tolist() for r in ranks]


def load(rank: EngineMemory, pool: Pool) -> list[bool]:
    """Which blocks landed in a rank."""
    digests = rank_digests(pool.view, SLOTS, rank)
    return [bool(ok) for ok in FormMover(rank, FORM).load(pool.view, SLOTS, LOADED, digests)]


def is_near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether no value is farther off than a step of the largest one."""
    farthest = (one.double() - other.double()).abs().max()
    return bool(farthest <= one.double().abs().max() / STEPS)


@pytest.mark.parametrize("stored_by", [1, 2])
@pytest.mark.parametrize("loaded_by", [1, 2])
@pytest.mark.parametrize("one_buffer", [True, False])
def test_blocks_come_back_near(
    pool: Pool, stored_by: int, loaded_by: int, one_buffer: bool
) -> None:
    """What any number of ranks stored, any other loads: near what it was, in its place alone."""
    source = make_ranks(stored_by, seed=1, one_buffer=one_buffer)
    target = make_ranks(loaded_by, one_buffer=one_buffer)

    assert store(source, pool) == [[True] * 3] * stored_by
    assert [load(rank, pool) for rank in target] == [[True] * 3] * loaded_by
    for stored, loaded in zip(STORED, LOADED, strict=True):
        assert is_near(whole(source, stored), whole(target, loaded))
        assert not is_equal(whole(source, stored), whole(target, loaded))
    untouched = [block for block in range(NUM_BLOCKS) if block not in LOADED]
    for rank in target:
        assert all((tensor[untouched] == 7).all() for tensor in rank.tensors)


def test_what_was_loaded_is_stored_as_it_was(pool: Pool) -> None:
    """A block that an engine loaded and stores again has the same bytes, page by page."""
    store(make_ranks(1, seed=2), pool)
    first = [pool.view.payload(slot).copy() for slot in SLOTS]
    (rank,) = make_ranks(1)
    load(rank, pool)
    FormMover(rank, FORM).store(pool.view, LOADED, SLOTS, None)

    for slot, before in zip(SLOTS, first, strict=True):
        np.testing.assert_array_equal(pool.view.payload(slot), before)


def test_a_bad_page_leaves_its_place_as_it_was(pool: Pool) -> None:
    """A bit flipped in a step or a magnitude is found; that page does not land, all others do."""
    store(make_ranks(1, seed=3), pool)
    payload = pool.view.payload(SLOTS[1])
    stored = FORM.stored_bytes
    for offset in (0, 17, stored - 1, stored, 3 * stored - 2, len(payload) - 1):
        payload[offset] ^= 1 << (offset % 8)
        (rank,) = make_ranks(1)
        assert load(rank, pool) == [True, False, True]
        layer, head = divmod(offset // stored, HEADS)
        page_is_old = [
            [bool((tensor[LOADED[1], idx] == 7).all()) for idx in range(HEADS)]
            for tensor in rank.tensors
        ]
        expected = [[(i, j) == (layer, head) for j in range(HEADS)] for i in range(3)]
        assert page_is_old == expected
        payload[offset] ^= 1 << (offset % 8)
    (rank,) = make_ranks(1)
    assert load(rank, pool) == [True] * 3


def test_a_page_in_no_form_does_not_land(pool: Pool) -> None:
    """Bytes with the right digest that are no numbers in this form are not brought back."""
    store(make_ranks(1, seed=4), pool)
    pool.view.payload(SLOTS[0])[FORM.stored_bytes - 2 : FORM.stored_bytes] = 0xFF
    page = np.array([pool.view.page_addresses(np.array([SLOTS[0]]), 0, 1)[0, 0, 0]], np.uint64)
    scratch = np.zeros(FORM.stored_bytes, np.uint8)
    digest = np.zeros((1, 16), np.uint8)
    FormMover(make_ranks(1)[0], FORM)._copier.store(
        page, np.array([scratch.ctypes.data], np.uint64), FORM.stored_bytes, digest
    )
    pool.view.digests[SLOTS[0], 0, 0] = digest[0]
    (rank,) = make_ranks(1)

    assert load(rank, pool) == [False, True, True]
    assert (rank.tensors[0][LOADED[0], 0] == 7).all()
    assert not (rank.tensors[0][LOADED[0], 1] == 7).all()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_blocks_that_are_not_finite_are_not_stored(pool: Pool, value: float) -> None:
    """One value of one page is enough; the block's neighbors are stored."""
    (rank,) = make_ranks(1, seed=5)
    rank.tensors[2][STORED[1], 1, 3, 9] = value

    assert store([rank], pool) == [[True, False, True]]


def test_exact_blocks_are_moved_as_ever(tmp_path: Path) -> None:
    """Without a form even what is no number comes back to the bit, and every block is stored."""
    exact = Pool(tmp_path, LAYOUT)
    (rank,) = make_ranks(1, seed=6)
    for tensor in rank.tensors:
        tensor[:, 0, 0, 0] = float("nan")
    mover = HostMover(rank, 1)

    assert mover.form is None
    assert mover.store(exact.view, STORED, SLOTS, None).tolist() == [True] * 3
    before = [whole([rank], block).clone() for block in STORED]
    digests = rank_digests(exact.view, SLOTS, rank)
    assert mover.load(exact.view, SLOTS, LOADED, digests).all()
    for block, loaded in zip(before, LOADED, strict=True):
        assert is_equal(block, whole([rank], loaded))
    exact.close()
