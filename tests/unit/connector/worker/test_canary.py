"""The start-up canary finds every slip between an engine's memory and a pool."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvkeep.connector.identity import stored_layout
from kvkeep.connector.worker import movers
from kvkeep.connector.worker.canary import NULL_BLOCK_ID, run_canary
from kvkeep.connector.worker.form_mover import FormMover
from kvkeep.connector.worker.movers import HostMover
from kvkeep.connector.worker.views import EngineMemory
from kvkeep.model.errors import CorruptDataError
from kvkeep.transfer.int8_form import Int8Form
from tests.unit.connector.worker.memories import (
    Pool,
    fill,
    is_equal,
    make_layout,
    make_memory,
    make_tensors,
)

SLOT = 3


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    """A pool for blocks of two heads."""
    found = Pool(tmp_path, make_layout())
    yield found
    found.close()


def run(memory: EngineMemory, pool: Pool, moved: EngineMemory | None = None) -> None:
    """Run a canary; ``moved`` is what the mover wrongly believes."""
    run_canary(memory, HostMover(moved or memory, 1), pool.view, SLOT)


@pytest.mark.parametrize("is_one_buffer", [True, False])
@pytest.mark.parametrize("tp_rank", [None, 0, 1])
def test_a_right_path_passes(pool: Pool, is_one_buffer: bool, tp_rank: int | None) -> None:
    """A rank with all heads, and each of two with one, passes; its memory is as before."""
    num_heads, tp_size = (2, 1) if tp_rank is None else (1, 2)
    tensors = make_tensors(num_heads, is_one_buffer=is_one_buffer)
    fill(tensors, 1)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    run(make_memory(tensors, make_layout(), tp_rank=tp_rank or 0, tp_size=tp_size), pool)

    assert all(is_equal(before[name], tensors[name]) for name in tensors)


def swapped_layers(memory: EngineMemory) -> EngineMemory:
    """Two layers in each other's place."""
    return dataclasses.replace(memory, layer_addresses=memory.layer_addresses[[1, 0, 2]])


def doubled_layer(memory: EngineMemory) -> EngineMemory:
    """One layer moved twice, another not at all."""
    return dataclasses.replace(memory, layer_addresses=memory.layer_addresses[[0, 0, 2]])


def wrong_head_stride(memory: EngineMemory) -> EngineMemory:
    """The second head read from the next block."""
    return dataclasses.replace(memory, head_stride=memory.block_stride)


def shifted(memory: EngineMemory) -> EngineMemory:
    """Every page begins two bytes late."""
    return dataclasses.replace(memory, layer_addresses=memory.layer_addresses + np.uint64(2))


def another_block(memory: EngineMemory) -> EngineMemory:
    """Every layer begins a block late."""
    late = memory.layer_addresses + np.uint64(memory.block_stride)
    return dataclasses.replace(memory, layer_addresses=late)


SLIPS = [swapped_layers, doubled_layer, wrong_head_stride, shifted, another_block]


@pytest.mark.parametrize("slip", SLIPS, ids=lambda slip: slip.__name__)
def test_a_slip_in_addresses_is_found(
    pool: Pool, slip: Callable[[EngineMemory], EngineMemory]
) -> None:
    """Whatever the mover takes for the engine's pages, the canary sees, and block 0 is put back."""
    tensors = make_tensors(2)
    fill(tensors, 2)
    before = [tensor[NULL_BLOCK_ID].clone() for tensor in tensors.values()]
    memory = make_memory(tensors, make_layout())

    with pytest.raises(CorruptDataError, match="canary"):
        run(memory, pool, slip(memory))
    assert all(
        is_equal(block, tensor[NULL_BLOCK_ID])
        for block, tensor in zip(before, tensors.values(), strict=True)
    )


def test_heads_of_another_rank_are_found(pool: Pool) -> None:
    """A rank that writes its heads where another's belong is stopped."""
    memory = make_memory(make_tensors(1), make_layout(), tp_rank=1, tp_size=2)

    with pytest.raises(CorruptDataError, match="elsewhere"):
        run(memory, pool, dataclasses.replace(memory, first_head=0))


def test_swapped_heads_are_found(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads exchanged on the way there and back come back right, and are found all the same."""
    memory = make_memory(make_tensors(2), make_layout())
    right = HostMover._engine_pages

    def wrong(self: HostMover, block_ids: list[int]) -> object:
        pages = right(self, block_ids).reshape(-1, 2)
        return np.ascontiguousarray(pages[:, ::-1]).reshape(-1)

    monkeypatch.setattr(HostMover, "_engine_pages", wrong)

    with pytest.raises(CorruptDataError, match="elsewhere"):
        run(memory, pool)


def test_digests_that_do_not_arrive_are_found(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that moves bytes but loses digests could never tell a wrong block."""
    monkeypatch.setattr(movers, "write_digests", lambda *_: None)

    with pytest.raises(CorruptDataError, match="digests"):
        run(make_memory(make_tensors(2), make_layout()), pool)


def test_a_load_that_brings_nothing_is_found(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that claims success and moves nothing is seen from what lies in the engine."""
    monkeypatch.setattr(HostMover, "load", lambda *_: np.array([True]))

    with pytest.raises(CorruptDataError, match="came back changed"):
        run(make_memory(make_tensors(2), make_layout()), pool)


# ---- a pool that keeps another form


@pytest.fixture
def int8_pool(tmp_path: Path) -> Iterator[Pool]:
    """A pool for blocks of two heads in 8 bits."""
    found = Pool(tmp_path, stored_layout(make_layout(), int8_form()))
    yield found
    found.close()


def int8_form() -> Int8Form:
    """The form of a page."""
    return Int8Form(make_layout().dtype, make_layout().page_bytes)


@pytest.mark.parametrize("tp_rank", [None, 0, 1])
def test_a_right_path_through_a_form_passes(int8_pool: Pool, tp_rank: int | None) -> None:
    """What comes back within a step of the form passes; the engine's memory is as before."""
    num_heads, tp_size = (2, 1) if tp_rank is None else (1, 2)
    tensors = make_tensors(num_heads)
    fill(tensors, 3)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    memory = make_memory(tensors, make_layout(), tp_rank=tp_rank or 0, tp_size=tp_size)
    run_canary(memory, FormMover(memory, int8_form()), int8_pool.view, SLOT)

    assert all(is_equal(before[name], tensors[name]) for name in tensors)


def swap_layers(mover: FormMover) -> None:
    """Two layers in each other's place."""
    pages = mover._engine_pages
    pages[0], pages[1] = pages[1], pages[0]


def swap_heads(mover: FormMover) -> None:
    """Heads exchanged on the way there and back."""
    mover._engine_pages = [pages[:, ::-1] for pages in mover._engine_pages]


def shift_blocks(mover: FormMover) -> None:
    """Every layer begins a block late."""
    mover._engine_pages = [pages[1:] for pages in mover._engine_pages]


def mistake_type(mover: FormMover) -> None:
    """Pages taken for another type of the same size."""
    mover.form = Int8Form("float16", make_layout().page_bytes)


FORM_SLIPS = [swap_layers, swap_heads, shift_blocks, mistake_type]


@pytest.mark.parametrize("slip", FORM_SLIPS, ids=lambda slip: slip.__name__)
def test_a_slip_on_the_way_through_a_form_is_found(
    int8_pool: Pool, slip: Callable[[FormMover], None]
) -> None:
    """Few steps hide no wrong place and no wrong type."""
    memory = make_memory(make_tensors(2), make_layout())
    mover = FormMover(memory, int8_form())
    slip(mover)

    with pytest.raises(CorruptDataError, match="canary"):
        run_canary(memory, mover, int8_pool.view, SLOT)
