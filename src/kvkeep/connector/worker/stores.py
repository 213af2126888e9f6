"""Stores blocks off the engine's path: a thread that reserves slots, copies and commits.

The engine's blocks are held by the scheduler side until the job is reported, so every job is
reported exactly once, whatever happens to the daemon, and within a bounded time.
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvkeep.client.connection import Connection
from kvkeep.connector.metadata import StoreJob
from kvkeep.connector.worker.attachment import Attachment, MappedPool
from kvkeep.connector.worker.movers import BlockMover
from kvkeep.connector.worker.views import EngineMemory
from kvkeep.core.effects import NO_SLOT
from kvkeep.model.clock import Clock
from kvkeep.model.errors import RefusedError, UnavailableError
from kvkeep.model.ids import HASH_BYTES
from kvkeep.protocol import messages as m
from kvkeep.protocol.codec import split_slots

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 1.0
"""A daemon that needs longer counts as lost, unless more patience is asked for; blocks wait in the
engine meanwhile."""
BATCH_BLOCKS = 64
"""Blocks per lease: some 50 MB, a few milliseconds of copying, so that a lease is short."""
REST_S = 0.001
"""What a request that arrives meanwhile may lose; vLLM's core sleeps as long after such a step."""


@dataclass(frozen=True, slots=True)
class _Queued:
    job: StoreJob
    namespace: bytes
    after: Any


class Batches:
    """Stores blocks of one rank's memory, a lease at a time; the caller's thread waits."""

    def __init__(
        self,
        attachment: Attachment,
        mover: BlockMover,
        memory: EngineMemory,
        clock: Clock,
        *,
        lease_s: float,
        timeout_s: float,
    ) -> None:
        self._attachment = attachment
        self._mover = mover
        self._memory = memory
        self._clock = clock
        self._lease_s = lease_s
        self._call_timeout_s = timeout_s
        self.num_declined = 0
        """Blocks that have no form in which they could be stored."""

    def store(
        self,
        connection: Connection,
        pool: MappedPool,
        namespace: bytes,
        hashes: bytes,
        block_ids: Sequence[int],
        after: Any,
    ) -> None:
        """Store ``BATCH_BLOCKS`` blocks at most; those that are there already are left as they are.

        Args:
            connection: To the daemon that lent ``pool``.
            pool: Where to.
            namespace: Of the blocks.
            hashes: Of the blocks.
            block_ids: Where they lie in this rank's memory.
            after: What the mover's ``snapshot`` returned when they were computed.

        Raises:
            UnavailableError, RefusedError: The daemon was lost.
        """
        asked_s = self._clock.now_s()
        lease_s = connection.lease_s(self._lease_s)
        reserved = connection.call(
            m.Reserve(
                connection.next_request_id(), namespace, 0, hashes,
                self._memory.first_head, self._memory.num_heads, lease_s,
            ),
            m.Reserved,
            self._call_timeout_s,
        )  # fmt: skip
        if not reserved.lease_id:
            return
        slots = split_slots(reserved.slots)
        granted = [
            (block_id, slot)
            for block_id, slot in zip(block_ids, slots, strict=True)
            if slot != NO_SLOT
        ]
        begun_s = self._clock.now_s()
        is_stored = np.zeros(len(granted), dtype=np.bool_)
        with self._attachment.copying(connection) as may_begin:
            # A copy that begins late could still run when the lease is over; a fence would catch
            # it, but the slots would be out of use until this process says that it is quiet.
            is_timely = begun_s - asked_s < lease_s / 2
            is_copied = may_begin and is_timely and pool.view.is_whole()
            if is_copied:
                is_stored = self._mover.store(
                    pool.view, [b for b, _ in granted], [s for _, s in granted], after
                )
                self._count_declined(len(granted) - int(np.count_nonzero(is_stored)))
        store_us = int((self._clock.now_s() - begun_s) * 1e6)
        committed = connection.call(
            m.Commit(
                connection.next_request_id(), reserved.lease_id, is_stored.tobytes(), store_us
            ),
            m.Committed,
            self._call_timeout_s,
        )
        if committed.is_fenced:
            log.warning("kvkeep: a store came too late and was refused. blocks=%d", len(granted))

    def _count_declined(self, num_blocks: int) -> None:
        if num_blocks:
            self.num_declined += num_blocks
            log.warning(
                "kvkeep: blocks with values that are not finite are not stored. blocks=%d total=%d",
                num_blocks,
                self.num_declined,
            )


class StoreThread:
    """Works through store jobs in order."""

    def __init__(
        self,
        attachment: Attachment,
        mover: BlockMover,
        memory: EngineMemory,
        clock: Clock,
        *,
        lease_s: float,
        patience_s: float = CALL_TIMEOUT_S,
    ) -> None:
        self._attachment = attachment
        self._call_timeout_s = max(CALL_TIMEOUT_S, patience_s)
        self._batches = Batches(
            attachment, mover, memory, clock, lease_s=lease_s, timeout_s=self._call_timeout_s
        )
        # Bounded by the scheduler side, which counts the jobs in flight (store_jobs_max).
        self._queue: queue.SimpleQueue[_Queued | None] = queue.SimpleQueue()
        self._finished: deque[int] = deque()
        self._has_news = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvkeep-store", daemon=True)
        self._thread.start()

    @property
    def num_declined(self) -> int:
        """Blocks that have no form in which they could be stored."""
        return self._batches.num_declined

    def submit(self, job: StoreJob, namespace: bytes, after: Any) -> None:
        """Queue a job; ``poll`` will name it exactly once."""
        self._queue.put(_Queued(job, namespace, after))

    def skip(self, job: StoreJob) -> None:
        """Report a job without storing anything."""
        self._end(job.job_id)

    def _end(self, job_id: int) -> None:
        self._finished.append(job_id)
        self._has_news.set()

    def rest(self) -> None:
        """Sleep until a job has ended that ``poll`` has not named, ``REST_S`` at most.

        A step without anything to compute comes at once after the one before: ranks that only poll
        their message queues (``sched_yield`` without a pause; vllm 0.32, shm_broadcast.py) can take
        every core from the daemon that answers their stores (docs/decisions/0036).
        """
        self._has_news.wait(REST_S)

    def poll(self) -> list[int]:
        """Jobs that ended since the last call, stored or not."""
        self._has_news.clear()
        if not self._thread.is_alive():
            # Something unforeseen ended it; what was still to come is over too.
            while not self._queue.empty():
                queued = self._queue.get_nowait()
                if queued is not None:
                    self._finished.append(queued.job.job_id)
        ended = []
        while self._finished:
            ended.append(self._finished.popleft())
        return ended

    def close(self) -> None:
        """Stop after the job at hand; waits for it, because its copy writes to the pool."""
        self._queue.put(None)
        self._thread.join(timeout=self._call_timeout_s * 4)

    def _run(self) -> None:
        while (queued := self._queue.get()) is not None:
            try:
                self._store(queued)
            finally:
                self._end(queued.job.job_id)

    def _store(self, queued: _Queued) -> None:
        for start in range(0, len(queued.job.block_ids), BATCH_BLOCKS):
            block_ids = queued.job.block_ids[start : start + BATCH_BLOCKS]
            hashes = queued.job.hashes[start * HASH_BYTES :][: len(block_ids) * HASH_BYTES]
            connection = self._attachment.link.connection
            pool = self._attachment.pool
            if connection is None or pool is None or not pool.is_proven:
                return
            try:
                self._batches.store(
                    connection, pool, queued.namespace, hashes, block_ids, queued.after
                )
            except (UnavailableError, RefusedError) as error:
                self._attachment.link.lost(connection, error)
                return
