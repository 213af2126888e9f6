"""A worker whose copies go on while the forward pass is launched, as they do on a GPU."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvkeep.connector.metadata import LoadJob, StepMetadata
from kvkeep.connector.worker.attachment import Attachment, MappedPool
from kvkeep.connector.worker.movers import HostMover
from kvkeep.connector.worker.side import WorkerSide
from kvkeep.model.clock import SystemClock
from kvkeep.model.ids import BlockHash
from tests.unit.connector.worker.memories import (
    NAMESPACE,
    Pool,
    fill,
    make_layout,
    make_memory,
    make_tensors,
)

HASHES = [BlockHash(bytes([n]) * 32) for n in range(4)]


class _LateLanding:
    """Copies when it is waited for."""

    seconds: float | None = 0.25

    def __init__(self, copy: Any) -> None:
        self._copy = copy
        self.layers: list[int] = []
        self.error: Exception | None = None
        self.num_waits = 0

    def wait_for_layer(self, layer: int) -> None:
        self.layers.append(layer)

    def wait(self) -> npt.NDArray[np.bool_]:
        self.num_waits += 1
        if self.error is not None:
            raise self.error
        landed: npt.NDArray[np.bool_] = self._copy()
        return landed


class _LateMover(HostMover):
    landing: _LateLanding

    def begin_load(
        self, pool: Any, slots: Sequence[int], block_ids: Sequence[int], digests: Any
    ) -> _LateLanding:
        self.slots = list(slots)
        self.landing = _LateLanding(lambda: self.load(pool, slots, block_ids, digests))
        return self.landing


class Rank:
    """A worker with a pool that holds four blocks, and no daemon."""

    def __init__(self, folder: Path) -> None:
        layout = make_layout()
        self.pool = Pool(folder, layout)
        self.tensors = make_tensors(layout.num_heads)
        memory = make_memory(self.tensors, layout)
        self.mover = _LateMover(memory, 1)
        fill(self.tensors, 1)
        self.mover.store(self.pool.view, [1, 2, 3, 4], [4, 5, 6, 7], None)
        for slot, block_hash in zip([4, 5, 6, 7], HASHES, strict=True):
            self.pool.commit(slot, block_hash)
        attachment = Attachment.__new__(Attachment)
        attachment.pool = MappedPool(self.pool.view, 0, None, 1, is_proven=True)  # type: ignore[arg-type]
        self.side = WorkerSide(
            namespace=NAMESPACE,
            memory=memory,
            mover=self.mover,
            attachment=attachment,
            clock=SystemClock(),
            lease_s=30.0,
        )

    def close(self) -> None:
        """End its thread and let go of the pool."""
        self.side._stores.close()
        self.pool.close()
        del self.side, self.mover

    def step(self, number: int, *jobs: LoadJob) -> StepMetadata:
        """A step with loads, begun."""
        metadata = StepMetadata(NAMESPACE, NAMESPACE, number, loads=list(jobs))
        assert self.side.load(metadata)
        return metadata


def job(req_id: str, first: int, count: int, *, block: int) -> LoadJob:
    """A load of some of the blocks in a row."""
    return LoadJob(
        req_id,
        b"".join(HASHES[first : first + count]),
        tuple(4 + first + n for n in range(count)),
        tuple(block + n for n in range(count)),
        1,
    )


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Rank]:
    found = Rank(tmp_path)
    yield found
    found.close()


def test_a_load_is_reported_when_it_has_ended_and_not_before(rank: Rank) -> None:
    """A report gives the slots back, and somebody else may write to them then."""
    rank.step(1, job("a", 0, 2, block=5))
    report = rank.side.take_report()
    assert rank.side.is_loading
    assert report is None or not report.loads

    assert rank.side.finish_loads()
    report = rank.side.take_report()
    assert report is not None
    result = report.loads["a"]
    assert (result.num_loaded, result.bad_blocks, result.load_us) == (2, [], 250_000)
    assert not rank.side.is_loading


def test_requests_of_a_step_move_together_and_are_told_apart(rank: Rank) -> None:
    """The first layers of all arrive first; a bad block is that of its own request."""
    rank.pool.view.payload(6)[100] ^= 1
    rank.step(1, job("a", 0, 1, block=5), job("b", 1, 3, block=1))
    assert rank.mover.slots == [4, 5, 6, 7]
    assert rank.side.finish_loads()
    report = rank.side.take_report()
    assert report is not None

    assert report.loads["a"].bad_blocks == []
    assert report.loads["b"].bad_blocks == [1]
    assert report.loads["b"].corrupt_hashes == [HASHES[2]]
    assert rank.side.take_bad_block_ids() == {2}


def test_a_layer_waits_for_its_own_blocks(rank: Rank) -> None:
    """By its name; one that is not known waits for all."""
    rank.side.wait_for_layer("layers.1")
    rank.step(1, job("a", 0, 1, block=5))
    for name in ("layers.0", "layers.2", "elsewhere"):
        rank.side.wait_for_layer(name)

    assert rank.mover.landing.layers == [0, 2, 3]


def test_a_load_that_fails_is_waited_for_and_reported_as_bad(rank: Rank) -> None:
    """Nothing may move any more when its blocks and slots are given back."""
    metadata = rank.step(1, job("a", 0, 2, block=5))
    rank.mover.landing.error = RuntimeError("the copy failed")
    with pytest.raises(RuntimeError):
        rank.side.finish_loads()
    rank.mover.landing.error = None
    rank.side.fail_loads(metadata)
    report = rank.side.take_report()
    assert report is not None

    assert rank.mover.landing.num_waits == 2
    assert report.loads["a"].bad_blocks == [0, 1]
    assert rank.side.take_bad_block_ids() == {5, 6}
    assert not rank.side.is_loading


def test_a_step_whose_end_nobody_told_ends_with_the_next(rank: Rank) -> None:
    """Its blocks are not read again before they have landed."""
    rank.step(1, job("a", 0, 1, block=5))
    landing = rank.mover.landing
    rank.step(2)

    assert landing.num_waits == 1
    assert not rank.side.is_loading
