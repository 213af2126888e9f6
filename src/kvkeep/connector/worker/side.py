"""The connector's half in a worker: copies, and the truth about how they went.

Loads run on the main thread before the forward pass that needs them; stores go to a thread. The
main thread never talks to the daemon: it reads the pool, and believes digests, not bookkeeping.
"""

import logging
import mmap
from typing import Any

import numpy as np

from kvkeep.connector.metadata import LoadJob, LoadResult, StepMetadata, StepReport
from kvkeep.connector.worker.attachment import Attachment, MappedPool
from kvkeep.connector.worker.canary import run_canary
from kvkeep.connector.worker.movers import BlockMover, rank_digests
from kvkeep.connector.worker.stores import StoreThread
from kvkeep.connector.worker.views import EngineMemory
from kvkeep.model.clock import Clock
from kvkeep.model.errors import CorruptDataError
from kvkeep.model.ids import Namespace
from kvkeep.protocol.codec import split_hashes

log = logging.getLogger(__name__)


class WorkerSide:
    """One rank."""

    def __init__(
        self,
        *,
        namespace: Namespace,
        memory: EngineMemory,
        mover: BlockMover,
        attachment: Attachment,
        clock: Clock,
        lease_s: float,
    ) -> None:
        self._namespace = namespace
        self._memory = memory
        self._mover = mover
        self._attachment = attachment
        self._clock = clock
        self._stores = StoreThread(attachment, mover, memory, clock, lease_s=lease_s)
        self._bad_block_ids: set[int] = set()
        self._report = StepReport()
        self._done: StepMetadata | None = None
        self._failed_pool: MappedPool | None = None

    # ---- the pool

    def prove_pool(self) -> MappedPool | None:
        """The pool if its canary has passed, after trying it the first time."""
        pool = self._attachment.pool
        if pool is None or pool is self._failed_pool:
            return None
        if pool.is_proven:
            return pool
        with self._attachment.copying(pool.connection) as may_begin:
            if not may_begin:
                return None
            try:
                run_canary(self._memory, self._mover, pool.view, pool.canary_slot)
            except CorruptDataError as error:
                # Not the pool's fault alone: this engine and this pool don't fit. Neither is used.
                log.error("kvkeep is switched off: %s", error)  # noqa: TRY400 - no trace helps here
                self._failed_pool = pool
                return None
        pool.is_proven = True
        return pool

    # ---- loading

    def load(self, metadata: StepMetadata) -> bool:
        """Bring this step's blocks into the engine; called once per step or more often.

        Returns:
            True: every block either landed or is reported as bad.
        """
        if metadata is self._done:
            return True
        self._done = metadata
        self._report.step = metadata.step
        if self._attachment.pool is not None:
            self.prove_pool()
        if not metadata.loads:
            return True
        begun_s = self._clock.now_s()
        landed = [self._load_job(metadata, job) for job in metadata.loads]
        load_us = int((self._clock.now_s() - begun_s) * 1e6)
        for job, (ok, corrupt) in zip(metadata.loads, landed, strict=True):
            bad = [idx for idx, is_ok in enumerate(ok) if not is_ok]
            self._bad_block_ids.update(job.block_ids[idx] for idx in bad)
            self._report.loads[job.req_id] = LoadResult(
                num_loaded=len(ok) - len(bad),
                bad_blocks=bad,
                corrupt_hashes=corrupt,
                load_us=load_us // len(metadata.loads),
            )
        return True

    def _load_job(self, metadata: StepMetadata, job: LoadJob) -> tuple[list[bool], list[bytes]]:
        """Which blocks landed, and the hashes of those whose bytes were wrong."""
        num_blocks = len(job.slots)
        pool = self._attachment.pool
        if metadata.base_namespace != self._namespace or pool is None or not pool.is_proven:
            return [False] * num_blocks, []
        view = pool.view
        if not view.is_whole():
            log.error("kvkeep's pool was cut; nothing is loaded from it")
            return [False] * num_blocks, []
        if max(job.slots) >= view.geometry.num_slots:
            return [False] * num_blocks, []
        if job.generation not in (0, pool.generation):
            # Lent by a daemon that this rank has not met yet, or by one that is gone: whatever
            # lies in these slots of this mapping, it proves nothing against the block.
            return [False] * num_blocks, []
        hashes = split_hashes(job.hashes)
        slots = np.asarray(job.slots, dtype=np.int64)
        # Digests first, then the headers: should the slot be lent to another block in between,
        # the header tells; should that happen later, the digest does.
        digests = rank_digests(view, job.slots, self._memory)
        readable = view.readable(slots, Namespace(metadata.namespace), 0, hashes)
        if not readable.all():
            num_blocks = int(np.argmin(readable))
        landed = self._copy(pool, job, digests, num_blocks)
        corrupt = [idx for idx, is_ok in enumerate(landed) if not is_ok]
        # What was lent and is not there would be lent again and again: it counts as corrupt too.
        corrupt += np.flatnonzero(~readable).tolist()
        landed += [False] * (len(hashes) - num_blocks)
        return landed, [bytes(hashes[idx]) for idx in corrupt]

    def _copy(self, pool: MappedPool, job: LoadJob, digests: Any, num_blocks: int) -> list[bool]:
        if not num_blocks:
            return []
        landed = self._mover.load(
            pool.view, job.slots[:num_blocks], job.block_ids[:num_blocks], digests[:num_blocks]
        )
        return [bool(ok) for ok in landed]

    def fail_loads(self, metadata: StepMetadata) -> None:
        """Count every load of this step as failed, whatever had arrived."""
        self._done = metadata
        for job in metadata.loads:
            self._bad_block_ids.update(job.block_ids)
            self._report.loads[job.req_id] = LoadResult(0, list(range(len(job.slots))), [], 0)
        self._report.step = metadata.step

    def take_bad_block_ids(self) -> set[int]:
        """Engine blocks that a load left without their content; vLLM computes them."""
        bad, self._bad_block_ids = self._bad_block_ids, set()
        return bad

    # ---- storing

    def store(self, metadata: StepMetadata) -> bool:
        """Queue the stores handed out with this step; an earlier one has computed their blocks.

        Returns:
            True: every store is queued, or skipped and will be reported.
        """
        if not metadata.stores:
            return True
        after = self._mover.snapshot()
        if metadata.base_namespace != self._namespace or not self._memory.is_writer:
            self.skip_stores(metadata)
        while metadata.stores:
            self._stores.submit(metadata.stores.pop(0), metadata.namespace, after)
        return True

    def store_urgent(self, metadata: StepMetadata) -> bool:
        """Queue what another engine waits for; for the begin of a step.

        Returns:
            True: what is not queued is left for ``store``, which comes after the forward pass.
        """
        urgent = [job for job in metadata.stores if job.is_urgent]
        if not urgent or metadata.base_namespace != self._namespace or not self._memory.is_writer:
            return True
        after = self._mover.snapshot()
        for job in urgent:
            metadata.stores.remove(job)
            self._stores.submit(job, metadata.namespace, after)
        return True

    def skip_stores(self, metadata: StepMetadata) -> None:
        """Report the stores of this step that are not queued yet, without storing anything."""
        while metadata.stores:
            self._stores.skip(metadata.stores.pop(0))

    def take_report(self) -> StepReport | None:
        """What happened since the last report, if anything did or is waited for."""
        report, self._report = self._report, StepReport(self._report.step)
        for job_id in self._stores.poll():
            report.finished_stores[job_id] = 1
        is_awaited = self._done is not None and self._done.is_awaited
        return report if report.loads or report.finished_stores or is_awaited else None

    def close(self) -> None:
        """Stop copying and end the session."""
        self._stores.close()
        self._attachment.close()


class IdleWorkerSide:
    """A rank whose memory kvkeep can't read: whatever it is asked to load or store, it declines."""

    def __init__(self) -> None:
        self._bad_block_ids: set[int] = set()
        self._report = StepReport()
        self._is_awaited = False

    def load(self, metadata: StepMetadata) -> bool:
        """Decline the loads."""
        self.fail_loads(metadata)
        return True

    def fail_loads(self, metadata: StepMetadata) -> None:
        """Report every block as bad, once."""
        for job in metadata.loads:
            self._bad_block_ids.update(job.block_ids)
            self._report.loads[job.req_id] = LoadResult(0, list(range(len(job.slots))), [], 0)
        metadata.loads = []
        self._report.step = metadata.step
        self._is_awaited = metadata.is_awaited

    def store(self, metadata: StepMetadata) -> bool:
        """Decline the stores."""
        self.skip_stores(metadata)
        return True

    def store_urgent(self, metadata: StepMetadata) -> bool:
        """Leave them for ``store``."""
        return True

    def skip_stores(self, metadata: StepMetadata) -> None:
        """Report every store as over, once."""
        for job in metadata.stores:
            self._report.finished_stores[job.job_id] = 1
        metadata.stores = []

    def take_bad_block_ids(self) -> set[int]:
        """Engine blocks that vLLM must compute."""
        bad, self._bad_block_ids = self._bad_block_ids, set()
        return bad

    def take_report(self) -> StepReport | None:
        """What was declined since the last report."""
        report, self._report = self._report, StepReport(self._report.step)
        is_news = report.loads or report.finished_stores or self._is_awaited
        return report if is_news else None

    def close(self) -> None:
        """Nothing to stop."""


def touch_pages(memory: EngineMemory) -> None:
    """Have the engine's KV pages present in memory, in huge pages where the system gives them.

    A load into pages that were never touched would pay a fault for each; the memory was set aside
    for KV anyway. Does nothing where the kernel can't (before Linux 5.14) or the memory is a GPU's.
    """
    if memory.device.type != "cpu":
        return
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    page = mmap.PAGESIZE
    for tensor in memory.tensors:
        start = -(-tensor.data_ptr() // page) * page
        length = (tensor.data_ptr() + tensor.numel() * tensor.element_size() - start) // page * page
        for advice in (mmap.MADV_HUGEPAGE, 23):  # 23: MADV_POPULATE_WRITE
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)
