"""Moves whole blocks between one rank's engine memory and the pool.

``HostMover`` serves engines whose KV lies in host memory (the CPU build of vLLM), ``FormMover`` the
same where the pool keeps it in another form, ``CudaMover`` and ``DirectMover`` GPUs. Blocks are
named by engine block ids and pool slots; leases and keys are the caller's affair.
"""

import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvkeep.connector.worker.landing import Landed, Landing
from kvkeep.connector.worker.views import EngineMemory
from kvkeep.tiers.shared_memory import PoolView
from kvkeep.transfer.host_copy import addresses, open_copier
from kvkeep.transfer.int8_form import Int8Form

COPY_THREADS_MAX = 4
"""More threads than this don't copy faster on one memory controller."""

Digests = npt.NDArray[np.uint8]


class BlockMover(Protocol):
    """Copies this rank's heads of blocks; only ``begin_load`` returns before they are done."""

    @property
    def form(self) -> Int8Form | None:
        """What pages become on their way to the pool; None: they stay as they are, to the bit."""
        ...

    def map_pool(self, pool: PoolView) -> None:
        """Make a pool ready that was just mapped; any thread, before it is used."""
        ...

    def snapshot(self) -> Any:
        """Mark the point in the engine's work up to which blocks are computed; main thread."""
        ...

    def store(
        self, pool: PoolView, block_ids: Sequence[int], slots: Sequence[int], after: Any
    ) -> npt.NDArray[np.bool_]:
        """Copy engine blocks to slots under a write lease, and write their digests.

        Args:
            pool: Holds the slots.
            block_ids: ``[num_blocks]``; not changed by the engine meanwhile.
            slots: ``[num_blocks]``.
            after: What ``snapshot`` returned in the step that computed them.

        Returns:
            bool ``[num_blocks]``: whether the slot now holds the block. What lies in the others
            must not be committed.
        """
        ...

    def load(
        self, pool: PoolView, slots: Sequence[int], block_ids: Sequence[int], digests: Digests
    ) -> npt.NDArray[np.bool_]:
        """Copy slots to engine blocks and check them.

        Args:
            pool: Holds the slots.
            slots: ``[num_blocks]``.
            block_ids: ``[num_blocks]``; nobody reads them yet.
            digests: uint8 ``[num_blocks, num_layers, num_heads, 16]``, taken before this call.

        Returns:
            bool ``[num_blocks]``: whether every page of the block landed with its digest. The
            contents of the others are unspecified.
        """
        ...

    def begin_load(
        self, pool: PoolView, slots: Sequence[int], block_ids: Sequence[int], digests: Digests
    ) -> Landing:
        """As ``load``, but copies may still run on return; the slots stay lent until they ended."""
        ...


class BlockingLoads:
    """What a mover inherits whose loads are over when they return."""

    def map_pool(self, pool: PoolView) -> None:
        """Nothing to make ready."""

    def load(
        self, pool: PoolView, slots: Sequence[int], block_ids: Sequence[int], digests: Digests
    ) -> npt.NDArray[np.bool_]:
        """See BlockMover."""
        raise NotImplementedError

    def begin_load(
        self, pool: PoolView, slots: Sequence[int], block_ids: Sequence[int], digests: Digests
    ) -> Landing:
        """See BlockMover."""
        return Landed(self.load(pool, slots, block_ids, digests))


def rank_digests(pool: PoolView, slots: Sequence[int], memory: EngineMemory) -> Digests:
    """A copy of the digests of this rank's heads: uint8 ``[num_blocks, layers, heads, 16]``."""
    heads = slice(memory.first_head, memory.first_head + memory.num_heads)
    return np.ascontiguousarray(pool.digests[np.asarray(slots, dtype=np.int64), :, heads])


def write_digests(
    pool: PoolView, slots: Sequence[int], memory: EngineMemory, digests: Digests
) -> None:
    """Put digests beside the headers of slots under a write lease."""
    heads = slice(memory.first_head, memory.first_head + memory.num_heads)
    pool.digests[np.asarray(slots, dtype=np.int64), :, heads] = digests


class HostMover(BlockingLoads):
    """Blocks in host memory: one pass per page, copy and digest together."""

    form = None

    def __init__(self, memory: EngineMemory, copy_threads: int) -> None:
        """Make a mover.

        Args:
            memory: This rank's blocks, in host memory.
            copy_threads: Threads per load; 0 chooses. Stores use one, so that they disturb the
                engine's own threads little.
        """
        self._memory = memory
        # The engine's own compute threads still spin on their cores when a load begins; a copy
        # that is preempted by one takes longer than one thread alone (docs/decisions/0003).
        num_threads = copy_threads or max(1, min(COPY_THREADS_MAX, (os.cpu_count() or 1) // 2))
        self._loader = open_copier(num_threads=num_threads)
        self._storer = open_copier()

    def _engine_pages(self, block_ids: Sequence[int]) -> npt.NDArray[np.uint64]:
        memory = self._memory
        return addresses(
            memory.layer_addresses,
            block_stride_bytes=memory.block_stride,
            head_stride_bytes=memory.head_stride,
            block_ids=block_ids,
            head_range=range(memory.num_heads),
        ).reshape(-1)

    def _pool_pages(self, pool: PoolView, slots: Sequence[int]) -> npt.NDArray[np.uint64]:
        memory = self._memory
        found = pool.page_addresses(
            np.asarray(slots, dtype=np.int64), memory.first_head, memory.num_heads
        )
        return found.reshape(-1)

    def snapshot(self) -> None:
        """Nothing to mark: the forward pass of a CPU engine is over when it returns."""

    def store(
        self, pool: PoolView, block_ids: Sequence[int], slots: Sequence[int], after: Any
    ) -> npt.NDArray[np.bool_]:
        """See BlockMover."""
        source, target = self._engine_pages(block_ids), self._pool_pages(pool, slots)
        digests = np.empty((len(source), 16), dtype=np.uint8)
        self._storer.store(source, target, pool.geometry.layout.page_bytes, digests)
        shape = (len(slots), pool.geometry.layout.num_layers, self._memory.num_heads, 16)
        write_digests(pool, slots, self._memory, digests.reshape(shape))
        return np.ones(len(slots), dtype=np.bool_)

    def load(
        self, pool: PoolView, slots: Sequence[int], block_ids: Sequence[int], digests: Digests
    ) -> npt.NDArray[np.bool_]:
        """See BlockMover."""
        source, target = self._pool_pages(pool, slots), self._engine_pages(block_ids)
        ok = np.empty(len(source), dtype=np.bool_)
        page_bytes = pool.geometry.layout.page_bytes
        self._loader.load(source, target, page_bytes, digests.reshape(-1, 16), ok)
        landed: npt.NDArray[np.bool_] = np.all(ok.reshape(len(slots), -1), axis=1)
        return landed
