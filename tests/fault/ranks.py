"""A rank's half of the connector over a real daemon, whose copies can be held at a point."""

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from kvkeep.connector.metadata import LoadJob, StepMetadata, StepReport, StoreJob
from kvkeep.connector.worker.attachment import Attachment
from kvkeep.connector.worker.movers import HostMover
from kvkeep.connector.worker.side import WorkerSide
from kvkeep.connector.worker.views import view_engine_memory
from kvkeep.model.clock import SystemClock
from kvkeep.model.ids import BlockHash
from tests.integration.daemons import LAYOUT, NAMESPACE, Daemon, payload_of, wait_until
from tests.waiting import HANG_S

NUM_BLOCKS = 64


class HeldMover(HostMover):
    """Stops in the midst of a store, if it is told to, until it is told to go on."""

    def __init__(self, memory: Any) -> None:
        super().__init__(memory, 1)
        self.error: Exception | None = None
        self._is_held = {"before": False, "after": False}
        self.reached = threading.Event()
        self.proceed = threading.Event()

    def hold(self, point: str) -> None:
        """Stop the next store ``before`` its bytes move, or ``after``."""
        self._is_held[point] = True
        self.reached.clear()
        self.proceed.clear()

    def _stop_at(self, point: str) -> None:
        if self._is_held[point]:
            self._is_held[point] = False
            self.reached.set()
            assert self.proceed.wait(HANG_S)

    def store(self, pool: Any, block_ids: Sequence[int], slots: Sequence[int], after: Any) -> Any:
        """See BlockMover."""
        self.slots = list(slots)
        self._stop_at("before")
        if self.error is not None:
            raise self.error
        is_stored = super().store(pool, block_ids, slots, after)
        self._stop_at("after")
        return is_stored


class HeldRank:
    """One rank with all heads of ``LAYOUT``; block ``n`` of its engine is free for the taking."""

    def __init__(
        self,
        daemon: Daemon,
        *,
        engine_id: str = "rank",
        lease_s: float = 30.0,
        patience_s: float = HANG_S,
    ) -> None:
        shape = (LAYOUT.num_layers, NUM_BLOCKS, LAYOUT.num_heads, LAYOUT.block_tokens, 32)
        self.kv = torch.zeros(shape, dtype=torch.bfloat16)
        self.bytes = self.kv.view(torch.uint8).numpy()
        tensors = {f"layers.{idx}": layer for idx, layer in enumerate(self.kv)}
        memory = view_engine_memory(tensors, NUM_BLOCKS, LAYOUT, tp_rank=0, tp_size=1)
        self.mover = HeldMover(memory)
        self.attachment = Attachment(daemon.socket, LAYOUT, engine_id)
        assert self.attachment.link.wait(HANG_S) is not None, self.attachment.link.refusal
        self.side = WorkerSide(
            namespace=NAMESPACE,
            memory=memory,
            mover=self.mover,
            attachment=self.attachment,
            clock=SystemClock(),
            lease_s=lease_s,
            patience_s=patience_s,
        )
        assert self.side.prove_pool() is not None
        self._ids = itertools.count(1)
        self.reported: list[int] = []
        """Store jobs, as often as they were reported."""

    def fill(self, block_id: int, block_hash: BlockHash) -> None:
        """Have an engine block hold what the hash stands for."""
        pages = payload_of(block_hash).reshape(LAYOUT.num_layers, LAYOUT.num_heads, -1)
        self.bytes[:, block_id] = pages.reshape(self.bytes[:, block_id].shape)

    def holds(self, block_id: int, block_hash: BlockHash) -> bool:
        """Whether an engine block holds what the hash stands for."""
        return bool(np.array_equal(self.bytes[:, block_id].reshape(-1), payload_of(block_hash)))

    def begin_store(self, hashes: Sequence[BlockHash], *, base: bytes = NAMESPACE) -> int:
        """Hand out a store of these blocks, from engine block 1 on; gives the job's id."""
        for block_id, block_hash in enumerate(hashes, 1):
            self.fill(block_id, block_hash)
        job_id = next(self._ids)
        metadata = StepMetadata(NAMESPACE, base, job_id)
        metadata.stores = [StoreJob(job_id, b"".join(hashes), tuple(range(1, len(hashes) + 1)))]
        self.side.load(metadata)
        self.side.store(metadata)
        return job_id

    def poll(self) -> StepReport | None:
        """Take this rank's report, as every step does."""
        report = self.side.take_report()
        if report is not None:
            self.reported += report.finished_stores
        return report

    def has_reported(self, job_id: int) -> bool:
        """Whether the job is over, after looking again."""
        self.poll()
        return job_id in self.reported

    def store(self, hashes: Sequence[BlockHash]) -> None:
        """Store blocks and wait until the job is over."""
        job_id = self.begin_store(hashes)
        wait_until(lambda: self.has_reported(job_id), "the store is reported")

    def load(
        self,
        hashes: Sequence[BlockHash],
        slots: Sequence[int],
        *,
        base: bytes = NAMESPACE,
        generation: int = 0,
    ) -> tuple[list[int], list[bytes]]:
        """Load blocks to engine block 33 and on, zeroed before.

        Returns:
            Which did not land, and the hashes of those found corrupt. What landed is right.
        """
        first = NUM_BLOCKS // 2 + 1
        self.bytes[:, first:] = 0
        block_ids = tuple(range(first, first + len(hashes)))
        metadata = StepMetadata(NAMESPACE, base, next(self._ids))
        metadata.loads = [LoadJob("r", b"".join(hashes), tuple(slots), block_ids, generation)]
        self.side.load(metadata)
        report = self.poll()
        assert report is not None
        result = report.loads["r"]
        assert self.side.take_bad_block_ids() == {block_ids[idx] for idx in result.bad_blocks}
        for idx, block_hash in enumerate(hashes):
            assert idx in result.bad_blocks or self.holds(block_ids[idx], block_hash)
        assert result.num_loaded == len(hashes) - len(result.bad_blocks)
        return result.bad_blocks, result.corrupt_hashes

    def is_attached(self) -> bool:
        """Whether there is a session with the daemon."""
        return self.attachment.link.connection is not None

    def close(self) -> None:
        """Stop its thread and end its session."""
        self.mover.proceed.set()
        self.side.close()


@contextmanager
def held_rank(daemon: Daemon, **settings: Any) -> Iterator[HeldRank]:
    """A rank that is attached and has proven its pool."""
    rank = HeldRank(daemon, **settings)
    try:
        yield rank
    finally:
        rank.close()
