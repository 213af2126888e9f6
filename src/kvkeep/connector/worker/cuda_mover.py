"""Moves blocks between GPU memory and the pool, through pinned staging buffers.

A store gathers a batch of blocks on a stream of its own, after the event that marks the end of the
forward pass that computed them; a load verifies a batch into the staging buffer and scatters it on
the engine's own stream, so that the forward pass that follows sees it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvkeep.connector.worker.movers import BlockingLoads, Digests, write_digests
from kvkeep.connector.worker.views import EngineMemory
from kvkeep.tiers.shared_memory import PoolView
from kvkeep.transfer.host_copy import open_copier

STAGING_BLOCKS = 64
"""Blocks per batch and buffer: some 170 MB of pinned memory for a 14-billion-parameter model."""
COPY_THREADS = 8
"""Digesting at the speed of the bus takes several cores."""


class _Staging:
    """A pinned buffer of whole blocks of this rank, packed layer by layer.

    So one layer of all blocks is one run of bytes, which the GPU scatters without copying it first.
    """

    def __init__(self, memory: EngineMemory, page_bytes: int) -> None:
        self._shape = len(memory.tensors), memory.num_heads, page_bytes
        num_bytes = STAGING_BLOCKS * int(np.prod(self._shape))
        self._tensor = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self._is_free = torch.cuda.Event()

    def rows(self, num_blocks: int) -> torch.Tensor:
        """The first bytes as uint8 ``[layers, blocks, heads, page]``."""
        num_layers, num_heads, page_bytes = self._shape
        num_bytes = num_blocks * num_layers * num_heads * page_bytes
        return self._tensor[:num_bytes].view(num_layers, num_blocks, num_heads, page_bytes)

    def pages(self, num_blocks: int) -> npt.NDArray[np.uint64]:
        """Addresses of the pages of ``rows``, in the pool's order: by block, layer, head."""
        num_layers, num_heads, page_bytes = self._shape
        block, layer, head = np.ogrid[:num_blocks, :num_layers, :num_heads]
        page = ((layer * num_blocks + block) * num_heads + head).reshape(-1).astype(np.uint64)
        addresses: npt.NDArray[np.uint64] = page * np.uint64(page_bytes)
        return addresses + np.uint64(self._tensor.data_ptr())

    def used_until(self, stream: Any) -> None:
        """What was queued on this stream so far reads the buffer."""
        self._is_free.record(stream)

    def wait(self) -> None:
        """Wait until the buffer may be written to."""
        self._is_free.synchronize()


class CudaMover(BlockingLoads):
    """See BlockMover. Stores run on one thread, loads on the main thread."""

    form = None

    def __init__(self, memory: EngineMemory) -> None:
        self._memory = memory
        page_bytes = memory.tensors[0][0, 0].numel() * memory.tensors[0].element_size()
        self._page_bytes = page_bytes
        self._store_staging = _Staging(memory, page_bytes)
        # One is filled while the bus empties the other.
        self._load_staging = [_Staging(memory, page_bytes) for _ in range(2)]
        self._store_stream = torch.cuda.Stream(device=memory.device)
        self._copier = open_copier(num_threads=COPY_THREADS)

    def snapshot(self) -> Any:
        """An event behind the forward pass just launched."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._memory.device))
        return event

    def _pool_pages(self, pool: PoolView, slots: Sequence[int]) -> npt.NDArray[np.uint64]:
        memory = self._memory
        wanted = np.asarray(slots, dtype=np.int64)
        return pool.page_addresses(wanted, memory.first_head, memory.num_heads).reshape(-1)

    def store(
        self, pool: PoolView, block_ids: Sequence[int], slots: Sequence[int], after: Any
    ) -> npt.NDArray[np.bool_]:
        """See BlockMover."""
        for start in range(0, len(slots), STAGING_BLOCKS):
            batch = slice(start, start + STAGING_BLOCKS)
            self._store_batch(pool, block_ids[batch], slots[batch], after)
        return np.ones(len(slots), dtype=np.bool_)

    def _store_batch(
        self, pool: PoolView, block_ids: Sequence[int], slots: Sequence[int], after: Any
    ) -> None:
        memory, num_blocks = self._memory, len(slots)
        with torch.cuda.device(memory.device), torch.cuda.stream(self._store_stream):
            self._store_stream.wait_event(after)
            idx = torch.tensor(block_ids, dtype=torch.int64).to(memory.device, non_blocking=True)
            gathered = torch.stack([t.index_select(0, idx) for t in memory.tensors])
            rows = self._store_staging.rows(num_blocks)
            rows.copy_(gathered.view(torch.uint8).view(rows.shape), non_blocking=True)
            self._store_stream.synchronize()
        source = self._store_staging.pages(num_blocks)
        digests = np.empty((len(source), 16), dtype=np.uint8)
        self._copier.store(source, self._pool_pages(pool, slots), self._page_bytes, digests)
        shape = (num_blocks, len(memory.tensors), memory.num_heads, 16)
        write_digests(pool, slots, memory, digests.reshape(shape))

    def load(
        self, pool: PoolView, slots: Sequence[int], block_ids: Sequence[int], digests: Digests
    ) -> npt.NDArray[np.bool_]:
        """See BlockMover."""
        landed = [
            self._load_batch(
                pool,
                slots[start : start + STAGING_BLOCKS],
                block_ids[start : start + STAGING_BLOCKS],
                digests[start : start + STAGING_BLOCKS],
            )
            for start in range(0, len(slots), STAGING_BLOCKS)
        ]
        return np.concatenate(landed)

    def _load_batch(
        self, pool: PoolView, slots: Sequence[int], block_ids: Sequence[int], digests: Digests
    ) -> npt.NDArray[np.bool_]:
        memory, num_blocks = self._memory, len(slots)
        staging = self._load_staging[0]
        self._load_staging.reverse()
        staging.wait()
        target = staging.pages(num_blocks)
        ok = np.empty(len(target), dtype=np.bool_)
        source = self._pool_pages(pool, slots)
        self._copier.load(source, target, self._page_bytes, digests.reshape(-1, 16), ok)
        landed: npt.NDArray[np.bool_] = np.all(ok.reshape(num_blocks, -1), axis=1)
        good = np.flatnonzero(landed)
        if not len(good):
            return landed
        on_device = staging.rows(num_blocks).to(memory.device, non_blocking=True)
        staging.used_until(torch.cuda.current_stream(memory.device))
        if len(good) < num_blocks:
            on_device = on_device[:, torch.from_numpy(good).to(memory.device)]
        wanted = torch.tensor([block_ids[i] for i in good], dtype=torch.int64).to(memory.device)
        for layer, tensor in enumerate(memory.tensors):
            block_shape = (len(good), *tensor.shape[1:])
            tensor.index_copy_(0, wanted, on_device[layer].view(tensor.dtype).view(block_shape))
        return landed
