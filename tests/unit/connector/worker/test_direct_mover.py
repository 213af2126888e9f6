"""What a GPU's mover does around the copies, on a device that copies in host memory instead."""

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.connector.worker import direct_mover
from kvkeep.connector.worker.canary import run_canary
from kvkeep.connector.worker.direct_mover import (
    SPAN_BYTES,
    DirectMover,
    layer_spans,
    slot_rows,
)
from kvkeep.connector.worker.movers import HostMover, rank_digests
from kvkeep.connector.worker.views import EngineMemory
from kvkeep.model.errors import UnavailableError
from kvkeep.tiers.shared_memory import PoolView
from kvkeep.transfer.arrivals import Gate
from tests.unit.connector.worker.memories import (
    Pool,
    fill,
    is_equal,
    make_layout,
    make_memory,
    make_tensors,
)
from tests.unit.transfer.gates import Door, failing_gate

HEADS = 4
SLOTS, STORED, LOADED = [5, 1, 4], [2, 7, 3], [6, 1, 5]


class _HostArrival:
    """Copies a span when somebody waits for one of its layers, as late as a GPU may."""

    def __init__(self, copies: Sequence[tuple[range, Any]], num_good: int | None) -> None:
        self._copies = list(copies)
        self._doors = [Door() for _ in copies]
        self._num_good = num_good
        self.num_landed = 0
        self.num_waits = 0

    @property
    def gates(self) -> list[Gate]:
        return [
            door.gate(layers.stop)
            if self._num_good is None or idx < self._num_good
            else failing_gate(layers.stop)
            for idx, (door, (layers, _)) in enumerate(zip(self._doors, self._copies, strict=True))
        ]

    def wait_for_layer(self, layer: int) -> None:
        while self.num_landed < len(self._copies) and self._copies[self.num_landed][0][0] <= layer:
            self._copies[self.num_landed][1]()
            self._doors[self.num_landed].open()
            self.num_landed += 1

    def wait(self) -> float:
        self.num_waits += 1
        self.wait_for_layer(1 << 30)
        return 0.5


class HostDevice:
    """See Device. Gathers two blocks at a time."""

    def __init__(self, memory: EngineMemory) -> None:
        self._memory = memory
        self.can_pin = True
        self.num_good_gates: int | None = None
        self.spans: list[range] = []
        self.arrival: _HostArrival | None = None

    def pin(self, pool: PoolView) -> bool:
        return self.can_pin

    def snapshot(self) -> str:
        return "snapshot"

    def _engine_run(self, layer: int, block: int) -> int:
        return int(self._memory.layer_addresses[layer]) + block * self._memory.block_stride

    def begin_load(
        self,
        pool: PoolView,
        slots: Sequence[int],
        block_ids: Sequence[int],
        spans: Sequence[range],
    ) -> _HostArrival:
        def copy(layers: range) -> None:
            for idx, (slot, block) in enumerate(zip(slots, block_ids, strict=True)):
                rows = next(slot_rows(pool, self._memory, [slot], idx))
                for layer in layers:
                    source = rows.target + layer * rows.target_pitch
                    ctypes.memmove(self._engine_run(layer, block), source, rows.width)

        self.spans = list(spans)
        copies = [(layers, lambda layers=layers: copy(layers)) for layers in spans]
        self.arrival = _HostArrival(copies, self.num_good_gates)
        return self.arrival

    def store(
        self, pool: PoolView, block_ids: Sequence[int], slots: Sequence[int], after: Any
    ) -> None:
        assert after == "snapshot"
        for start in range(0, len(slots), 2):
            blocks = block_ids[start : start + 2]
            gathered = np.concatenate([self._gathered(block) for block in blocks])
            for rows in slot_rows(
                pool, self._memory, slots[start : start + 2], gathered.ctypes.data
            ):
                for row in range(rows.num_rows):
                    ctypes.memmove(
                        rows.target + row * rows.target_pitch,
                        rows.source + row * rows.width,
                        rows.width,
                    )

    def _gathered(self, block: int) -> Any:
        layers = [tensor[block].contiguous() for tensor in self._memory.tensors]
        return np.concatenate([layer.view(-1).view(torch.uint8).numpy() for layer in layers])


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    """A pool for blocks of four heads."""
    found = Pool(tmp_path, make_layout(HEADS))
    yield found
    found.close()


def make_rank(tp_rank: int = 0, tp_size: int = 1) -> EngineMemory:
    """A rank of an engine, zeroed."""
    local = make_tensors(HEADS // tp_size)
    return make_memory(local, make_layout(HEADS), tp_rank=tp_rank, tp_size=tp_size)


def direct(memory: EngineMemory, pool: Pool) -> tuple[DirectMover, HostDevice]:
    """A mover of this memory that has pinned the pool."""
    device = HostDevice(memory)
    mover = DirectMover(memory, device)
    mover.map_pool(pool.view)
    return mover, device


def fill_rank(memory: EngineMemory, seed: int) -> None:
    """Give every element a value of its own."""
    fill({str(idx): tensor for idx, tensor in enumerate(memory.tensors)}, seed)


def stored(pool: Pool, tp_size: int = 1) -> list[EngineMemory]:
    """Ranks whose blocks were stored."""
    ranks = [make_rank(rank, tp_size) for rank in range(tp_size)]
    for seed, rank in enumerate(ranks):
        fill_rank(rank, seed)
        mover, _ = direct(rank, pool)
        assert mover.store(pool.view, STORED, SLOTS, mover.snapshot()).all()
    return ranks


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_the_pool_gets_the_bytes_and_digests_that_other_movers_give_it(
    pool: Pool, tmp_path: Path, tp_size: int
) -> None:
    """Each rank's heads in their places, and nothing else."""
    ranks = stored(pool, tp_size)
    (tmp_path / "other").mkdir()
    other = Pool(tmp_path / "other", make_layout(HEADS))
    for rank in ranks:
        HostMover(rank, 1).store(other.view, STORED, SLOTS, None)

    for slot in range(pool.view.geometry.num_slots):
        assert np.array_equal(pool.view.payload(slot), other.view.payload(slot))
        assert np.array_equal(pool.view.digests[slot], other.view.digests[slot])
    other.close()


@pytest.mark.parametrize("stored_by", [1, 2])
@pytest.mark.parametrize("loaded_by", [1, 4])
def test_blocks_come_back_bit_for_bit(pool: Pool, stored_by: int, loaded_by: int) -> None:
    """What any number of ranks stored, any other number loads, each its own heads."""
    sources = stored(pool, stored_by)
    targets = [make_rank(rank, loaded_by) for rank in range(loaded_by)]
    for target in targets:
        mover, _ = direct(target, pool)
        digests = rank_digests(pool.view, SLOTS, target)
        assert mover.load(pool.view, SLOTS, LOADED, digests).all()

    for layer in range(len(sources[0].tensors)):
        expected = torch.cat([rank.tensors[layer] for rank in sources], dim=1)
        found = torch.cat([rank.tensors[layer] for rank in targets], dim=1)
        assert is_equal(found[LOADED], expected[STORED])
        untouched = [block for block in range(8) if block not in LOADED]
        assert not found[untouched].any()


def test_the_canary_passes(pool: Pool) -> None:
    """Every layer and head lies where the layout says."""
    memory = make_rank(1, 2)
    mover, _ = direct(memory, pool)

    run_canary(memory, mover, pool.view, 3)


def test_a_bad_page_makes_its_block_bad_and_no_other(pool: Pool) -> None:
    """Of this rank's heads; what lies in another rank's is its affair."""
    stored(pool)
    layout = pool.view.geometry.layout
    for head, is_mine in ((0, False), (1, False), (2, True), (3, True)):
        memory = make_rank(1, 2)
        mover, _ = direct(memory, pool)
        offset = (layout.num_heads * 2 + head) * layout.page_bytes + 5
        digests = rank_digests(pool.view, SLOTS, memory)
        pool.view.payload(SLOTS[1])[offset] ^= 2
        landed = mover.load(pool.view, SLOTS, LOADED, digests)
        pool.view.payload(SLOTS[1])[offset] ^= 2

        assert landed.tolist() == [True, not is_mine, True]


def test_a_page_that_changes_before_it_has_landed_is_found(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests were right when the load began."""
    monkeypatch.setattr(direct_mover, "SPAN_BYTES", 1)
    stored(pool)
    memory = make_rank()
    mover, device = direct(memory, pool)
    landing = mover.begin_load(pool.view, SLOTS, LOADED, rank_digests(pool.view, SLOTS, memory))
    landing.wait_for_layer(0)
    assert device.arrival is not None
    assert device.arrival.num_landed == 1
    pool.view.payload(SLOTS[2])[-1] ^= 1

    assert landing.wait().tolist() == [True, True, False]
    assert landing.seconds == 0.5


def test_a_layer_waits_for_its_group_alone(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later ones are still on their way while the first is computed with."""
    monkeypatch.setattr(direct_mover, "SPAN_BYTES", 1)
    (source,) = stored(pool)
    memory = make_rank()
    mover, device = direct(memory, pool)
    landing = mover.begin_load(pool.view, SLOTS, LOADED, rank_digests(pool.view, SLOTS, memory))
    assert device.spans == [range(0, 1), range(1, 2), range(2, 3)]
    landing.wait_for_layer(1)

    for layer, has_landed in enumerate((True, True, False)):
        expected = source.tensors[layer][STORED]
        assert is_equal(memory.tensors[layer][LOADED], expected) == has_landed
    assert landing.wait().all()


def test_a_device_that_fails_is_waited_for_and_told(pool: Pool) -> None:
    """Nothing reads the pool when the error comes; told again when asked again."""
    stored(pool)
    memory = make_rank()
    mover, device = direct(memory, pool)
    device.num_good_gates = 0
    landing = mover.begin_load(pool.view, SLOTS, LOADED, rank_digests(pool.view, SLOTS, memory))

    assert device.arrival is not None
    for num_waits in (1, 2):
        with pytest.raises(UnavailableError):
            landing.wait()
        assert device.arrival.num_waits == num_waits


def test_copies_whose_pages_nobody_compares_are_waited_for(pool: Pool) -> None:
    """The caller gives the slots back when it hears of the error."""
    stored(pool)
    memory = make_rank()
    mover, device = direct(memory, pool)
    digests = rank_digests(pool.view, SLOTS, memory)

    with pytest.raises(ValueError, match="digests must be uint8"):
        mover.begin_load(pool.view, SLOTS, LOADED, digests[:2])
    assert device.arrival is not None
    assert device.arrival.num_waits == 1


class _Staged(HostMover):
    """In place of the mover through staging buffers, which needs a GPU."""

    def __init__(self, memory: EngineMemory) -> None:
        super().__init__(memory, 1)


def test_a_pool_that_was_not_pinned_is_served_through_staging_buffers(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stores, and loads that are over when they have begun."""
    monkeypatch.setattr(direct_mover, "CudaMover", _Staged)
    memory = make_rank()
    fill_rank(memory, 1)
    device = HostDevice(memory)
    device.can_pin = False
    mover = DirectMover(memory, device)
    mover.map_pool(pool.view)
    assert mover.store(pool.view, STORED, SLOTS, mover.snapshot()).all()
    landing = mover.begin_load(pool.view, SLOTS, LOADED, rank_digests(pool.view, SLOTS, memory))

    assert landing.seconds is None
    assert landing.wait().all()
    assert device.arrival is None
    assert is_equal(memory.tensors[2][LOADED], memory.tensors[2][STORED])


def test_memory_fits_whose_layers_are_runs_of_words() -> None:
    """Not where heads of a block lie apart."""
    memory = make_rank()
    assert DirectMover.fits(memory)

    tensors = {name: tensor[:, ::2] for name, tensor in make_tensors(HEADS * 2).items()}
    assert not DirectMover.fits(make_memory(tensors, make_layout(HEADS)))


@given(num_layers=st.integers(1, 200), num_bytes=st.integers(1, 400 * SPAN_BYTES))
def test_spans_hold_every_layer_once(num_layers: int, num_bytes: int) -> None:
    """In order, none empty, of about equal size, and no more than there are bytes for."""
    spans = layer_spans(num_layers, num_bytes)

    assert [layer for layers in spans for layer in layers] == list(range(num_layers))
    sizes = [len(layers) for layers in spans]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert len(spans) == 1 or len(spans) * SPAN_BYTES <= num_bytes
