"""The connector's half in a worker: copies, and the truth about how they went.

Loads begin on the main thread before the forward pass that needs them, and are over before the
step's report is made; stores go to a thread. The main thread never talks to the daemon: it reads
the pool, and believes digests, not bookkeeping.
"""

import logging
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvkeep.connector.cartridges.depositor import NO_DEPOSITS, Depositor
from kvkeep.connector.metadata import (
    DepositResult,
    LoadJob,
    LoadResult,
    StepMetadata,
    StepReport,
)
from kvkeep.connector.worker.attachment import Attachment, MappedPool
from kvkeep.connector.worker.canary import run_canary
from kvkeep.connector.worker.landing import Landing
from kvkeep.connector.worker.movers import BlockMover, rank_digests
from kvkeep.connector.worker.stores import CALL_TIMEOUT_S, StoreThread
from kvkeep.connector.worker.views import EngineMemory
from kvkeep.model.clock import Clock
from kvkeep.model.errors import CorruptDataError
from kvkeep.model.ids import BlockHash, Namespace
from kvkeep.protocol.codec import split_hashes

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Asked:
    """A load, and what of it can be read."""

    job: LoadJob
    hashes: Sequence[BlockHash]
    readable: npt.NDArray[np.bool_]
    """bool ``[blocks]``; empty: nothing was looked at."""
    num_blocks: int
    """Leading blocks that are loaded."""
    digests: Any = None
    """Of those blocks."""


@dataclass(slots=True)
class _Loading:
    """The loads of a step."""

    begun_s: float
    asked: list[_Asked]
    landing: Landing | None
    """None: no block of any could be read."""


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
        patience_s: float = CALL_TIMEOUT_S,
    ) -> None:
        self._namespace = namespace
        self._memory = memory
        self._mover = mover
        self._attachment = attachment
        self._clock = clock
        self._stores = StoreThread(
            attachment, mover, memory, clock, lease_s=lease_s, patience_s=patience_s
        )
        self._bad_block_ids: set[int] = set()
        self._report = StepReport()
        self._done: StepMetadata | None = None
        self._failed_pool: MappedPool | None = None
        self._loading: _Loading | None = None
        self.depositor: Depositor | None = None
        """Brings cartridges to the pool; set before the first step."""

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

    @property
    def is_loading(self) -> bool:
        """Whether blocks are on their way into the engine."""
        return self._loading is not None

    def load(self, metadata: StepMetadata) -> bool:
        """Begin to bring this step's blocks into the engine; called once per step or more often.

        Returns:
            True: every block is on its way, or will be reported as bad by ``finish_loads``.
        """
        if metadata is self._done:
            return True
        # Of a step whose end nobody told.
        self.finish_loads()
        self._done = metadata
        self._report.step = metadata.step
        if self._attachment.pool is not None:
            self.prove_pool()
        if metadata.loads:
            self._loading = self._begin_loads(metadata)
            landing = self._loading.landing
            if landing is None or landing.seconds is None:
                self.finish_loads()
        return True

    def _begin_loads(self, metadata: StepMetadata) -> _Loading:
        begun_s = self._clock.now_s()
        pool = self._attachment.pool
        asked = [self._ask(metadata, pool, job) for job in metadata.loads]
        found = [each for each in asked if each.num_blocks]
        landing = None
        if pool is not None and found:
            # All requests' blocks at once: their first layers arrive before anybody's last.
            landing = self._mover.begin_load(
                pool.view,
                [slot for each in found for slot in each.job.slots[: each.num_blocks]],
                [block for each in found for block in each.job.block_ids[: each.num_blocks]],
                np.concatenate([each.digests[: each.num_blocks] for each in found]),
            )
        return _Loading(begun_s, asked, landing)

    def _ask(self, metadata: StepMetadata, pool: MappedPool | None, job: LoadJob) -> _Asked:
        """Which blocks of a load are there."""
        nothing = _Asked(job, [], np.zeros(0, dtype=np.bool_), 0)
        if metadata.base_namespace != self._namespace or pool is None or not pool.is_proven:
            return nothing
        view = pool.view
        if not view.is_whole():
            log.error("kvkeep's pool was cut; nothing is loaded from it")
            return nothing
        if max(job.slots) >= view.geometry.num_slots:
            return nothing
        if job.generation not in (0, pool.generation):
            # Lent by a daemon that this rank has not met yet, or by one that is gone: whatever
            # lies in these slots of this mapping, it proves nothing against the block.
            return nothing
        hashes = split_hashes(job.hashes)
        slots = np.asarray(job.slots, dtype=np.int64)
        # Digests first, then the headers: should the slot be lent to another block in between,
        # the header tells; should that happen later, the digest does.
        digests = rank_digests(view, job.slots, self._memory)
        readable = view.readable(slots, Namespace(metadata.namespace), 0, hashes)
        num_blocks = len(slots) if readable.all() else int(np.argmin(readable))
        return _Asked(job, hashes, readable, num_blocks, digests)

    def wait_for_layer(self, layer_name: str) -> None:
        """Have the engine's work from here on wait for a layer's blocks."""
        if self._loading is not None and self._loading.landing is not None:
            indices = self._memory.layer_indices
            # A name that nobody registered reads somebody else's tensor: whose, is not known.
            self._loading.landing.wait_for_layer(indices.get(layer_name, len(indices)))

    def finish_loads(self) -> bool:
        """Wait for this step's blocks and report how they arrived.

        Returns:
            True: nothing is on its way any more.
        """
        loading = self._loading
        if loading is None:
            return True
        landed = [] if loading.landing is None else loading.landing.wait().tolist()
        self._loading = None
        seconds = None if loading.landing is None else loading.landing.seconds
        if seconds is None:
            seconds = self._clock.now_s() - loading.begun_s
        for asked in loading.asked:
            self._take_load(asked, landed[: asked.num_blocks], seconds / len(loading.asked))
            landed = landed[asked.num_blocks :]
        return True

    def _take_load(self, asked: _Asked, landed: list[bool], seconds: float) -> None:
        """Report a load whose leading blocks landed so."""
        job = asked.job
        ok = landed + [False] * (len(job.slots) - len(landed))
        corrupt = [idx for idx, is_landed in enumerate(landed) if not is_landed]
        # What was lent and is not there would be lent again and again: it counts as corrupt too.
        corrupt += np.flatnonzero(~asked.readable).tolist()
        bad = [idx for idx, is_ok in enumerate(ok) if not is_ok]
        self._bad_block_ids.update(job.block_ids[idx] for idx in bad)
        self._report.loads[job.req_id] = LoadResult(
            num_loaded=len(ok) - len(bad),
            bad_blocks=bad,
            corrupt_hashes=[bytes(asked.hashes[idx]) for idx in corrupt],
            load_us=int(seconds * 1e6),
        )

    def fail_loads(self, metadata: StepMetadata) -> None:
        """Count every load of this step as failed, whatever had arrived."""
        loading, self._loading = self._loading, None
        if loading is not None and loading.landing is not None:
            # Blocks and slots are given back by what is reported here.
            loading.landing.wait()
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
        self._deposit(metadata)
        if not metadata.stores:
            return True
        after = self._mover.snapshot()
        if metadata.base_namespace != self._namespace or not self._memory.is_writer:
            self.skip_stores(metadata)
        while metadata.stores:
            self._stores.submit(metadata.stores.pop(0), metadata.namespace, after)
        return True

    def _deposit(self, metadata: StepMetadata) -> None:
        while metadata.deposits:
            job = metadata.deposits.pop(0)
            is_mine = metadata.base_namespace == self._namespace
            if self.depositor is None or not is_mine:
                self._report.deposits[job.job_id] = DepositResult(1, NO_DEPOSITS)
            elif not self._memory.is_writer:
                self._report.deposits[job.job_id] = DepositResult(1)
            else:
                self.depositor.submit(job, metadata.namespace)

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
        if self._done is not None and self._done.may_rest:
            self._stores.rest()
        report, self._report = self._report, StepReport(self._report.step)
        for job_id in self._stores.poll():
            report.finished_stores[job_id] = 1
        if self.depositor is not None:
            report.deposits |= self.depositor.poll()
        is_awaited = self._done is not None and self._done.is_awaited
        is_news = report.loads or report.finished_stores or report.deposits
        return report if is_news or is_awaited else None

    def close(self) -> None:
        """Stop copying and end the session."""
        if self.depositor is not None:
            self.depositor.close()
        self._stores.close()
        self._attachment.close()


class IdleWorkerSide:
    """A rank whose memory kvkeep can't read: whatever it is asked to load or store, it declines."""

    is_loading = False

    def __init__(self) -> None:
        self._bad_block_ids: set[int] = set()
        self._report = StepReport()
        self._is_awaited = False

    def load(self, metadata: StepMetadata) -> bool:
        """Decline the loads."""
        self.fail_loads(metadata)
        return True

    def wait_for_layer(self, layer_name: str) -> None:
        """Nothing is on its way."""

    def finish_loads(self) -> bool:
        """Nothing is on its way."""
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
        for deposit in metadata.deposits:
            self._report.deposits[deposit.job_id] = DepositResult(1, NO_DEPOSITS)
        metadata.stores, metadata.deposits = [], []

    def take_bad_block_ids(self) -> set[int]:
        """Engine blocks that vLLM must compute."""
        bad, self._bad_block_ids = self._bad_block_ids, set()
        return bad

    def take_report(self) -> StepReport | None:
        """What was declined since the last report."""
        report, self._report = self._report, StepReport(self._report.step)
        is_news = report.loads or report.finished_stores or report.deposits or self._is_awaited
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
