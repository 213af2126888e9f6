"""Moves blocks between GPU memory and the pool itself, which the GPU's driver has pinned.

A load reads layer by layer on a stream of its own, and the attention of a layer waits for that
layer alone: most of the bus's time passes while the forward pass is still being launched. Digests
are compared meanwhile on the host, each page after the GPU has read it, so a page that a stray
writer changed before or while it was read is found as surely as one that had rotted. The load is
over, and its lease may be given back, when both are done.
"""

import itertools
import logging
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvkeep.connector.worker.cuda_mover import CudaMover
from kvkeep.connector.worker.landing import Landed, Landing
from kvkeep.connector.worker.movers import Digests, write_digests
from kvkeep.connector.worker.page_kernel import NUM_WARPS, WORDS_AT_ONCE, move_blocks
from kvkeep.connector.worker.views import EngineMemory
from kvkeep.tiers.shared_memory import PoolView
from kvkeep.transfer.host_copy import open_copier

WORD_BYTES = 8
LOAD_PROGRAMS = 32
"""Fill the bus (51 of 55 GB/s on an H200) and leave the GPU's other processors to the engine."""
STORE_PROGRAMS = 8
STORE_BLOCKS = 256
"""At once: a load that begins meanwhile shares the bus for some milliseconds at most."""
GROUP_BYTES = 64 << 20
"""Layers that are waited for together: a launch of its own for less costs more than it hides."""
VERIFY_THREADS = 8
"""Faster together than the bus (72 GB/s on an H200's host)."""
STORE_THREADS = 2
PORTABLE_AND_MAPPED = 3
"""cudaHostRegisterPortable | cudaHostRegisterMapped."""

log = logging.getLogger(__name__)


class _DirectLanding:
    """A load of some blocks by a ``DirectMover``."""

    def __init__(self, device: torch.device, num_layers: int) -> None:
        self._device = device
        self._num_layers = num_layers
        self.begun = torch.cuda.Event(enable_timing=True)
        self.groups: list[tuple[int, int, Any]] = []
        """First layer, the one behind the last, and the event when they have landed."""
        self.verified: Future[npt.NDArray[np.bool_]] | None = None
        self._num_awaited = 0
        self.seconds: float | None = 0.0

    def wait_for_layer(self, layer: int) -> None:
        """See Landing."""
        while self._num_awaited < len(self.groups) and self.groups[self._num_awaited][0] <= layer:
            torch.cuda.current_stream(self._device).wait_event(self.groups[self._num_awaited][2])
            self._num_awaited += 1

    def wait(self) -> npt.NDArray[np.bool_]:
        """See Landing."""
        # Whatever the engine launches next may reuse these blocks.
        self.wait_for_layer(self._num_layers)
        assert self.verified is not None
        try:
            landed = self.verified.result()
        finally:
            # Whatever became of the digests: nothing reads the pool any more.
            self.groups[-1][2].synchronize()
        self.seconds = self.begun.elapsed_time(self.groups[-1][2]) / 1e3
        return landed


class DirectMover:
    """See BlockMover. Stores run on one thread, loads begin on the main thread.

    A pool that the driver did not pin is served through staging buffers.
    """

    form = None

    def __init__(self, memory: EngineMemory) -> None:
        self._memory = memory
        self._page_bytes = memory.tensors[0][0, 0].numel() * memory.tensors[0].element_size()
        self._run_bytes = memory.num_heads * self._page_bytes
        self._staged: CudaMover | None = None
        addresses = memory.layer_addresses.astype(np.int64)
        self._layers = torch.from_numpy(addresses).to(memory.device)
        self._store_stream = torch.cuda.Stream(device=memory.device)
        self._load_stream = torch.cuda.Stream(device=memory.device, priority=-1)
        self._verifier = ThreadPoolExecutor(1, "kvkeep-verify")
        self._loader = open_copier(num_threads=VERIFY_THREADS)
        self._storer = open_copier(num_threads=STORE_THREADS)
        self._pinned: weakref.WeakSet[PoolView] = weakref.WeakSet()

    @staticmethod
    def fits(memory: EngineMemory) -> bool:
        """Whether a layer of a block is one run of whole words in the engine's memory."""
        page_bytes = memory.tensors[0][0, 0].numel() * memory.tensors[0].element_size()
        return (
            memory.head_stride == page_bytes
            and page_bytes % WORD_BYTES == 0
            and memory.block_stride % WORD_BYTES == 0
        )

    def map_pool(self, pool: PoolView) -> None:
        """Have the driver pin a pool, on any thread; takes a second for some ten GiB."""
        if pool in self._pinned:
            return
        runtime = torch.cuda.cudart()
        with torch.cuda.device(self._memory.device):
            error = int(
                runtime.cudaHostRegister(pool.base_address, pool.num_bytes, PORTABLE_AND_MAPPED)
            )
        if error:
            log.warning(
                "kvkeep's pool can't be pinned and is copied through staging buffers, "
                "several times slower: CUDA error %d. Raise the limit on locked memory (ulimit -l)",
                error,
            )
            return
        self._pinned.add(pool)
        finalizer = weakref.finalize(pool, runtime.cudaHostUnregister, pool.base_address)
        # The driver goes before the interpreter's last mappings do.
        finalizer.atexit = False

    def snapshot(self) -> Any:
        """An event behind the forward pass just launched."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._memory.device))
        return event

    def _staging(self) -> CudaMover:
        if self._staged is None:
            self._staged = CudaMover(self._memory)
        return self._staged

    def _move(
        self,
        pool: PoolView,
        index: torch.Tensor,
        num_blocks: int,
        layers: range,
        *,
        is_load: bool,
    ) -> None:
        """Queue the moves of some layers on the current stream.

        Args:
            pool: Pinned.
            index: What ``_index`` gave.
            num_blocks: Of it.
            layers: That move.
            is_load: From the pool, or to it.
        """
        memory, layout = self._memory, pool.geometry.layout
        move_blocks[(LOAD_PROGRAMS if is_load else STORE_PROGRAMS,)](
            pool.base_address + pool.geometry.payload_offset,
            self._layers,
            index[0],
            index[1],
            num_blocks,
            layers.start,
            len(layers),
            layout.block_bytes // WORD_BYTES,
            layout.num_heads * self._page_bytes // WORD_BYTES,
            memory.first_head * self._page_bytes // WORD_BYTES,
            memory.block_stride // WORD_BYTES,
            RUN_WORDS=self._run_bytes // WORD_BYTES,
            IS_LOAD=is_load,
            AT_ONCE=WORDS_AT_ONCE,
            num_warps=NUM_WARPS,
        )

    def _index(self, slots: Sequence[int], block_ids: Sequence[int]) -> torch.Tensor:
        """int64 ``[2, num_blocks or one more]`` on the GPU: slots, engine blocks.

        Of an even length, so that both rows begin at 16 bytes: for others the kernel would be
        compiled anew, in the midst of service.
        """
        padding = [0] * (len(slots) % 2)
        index = torch.tensor([[*slots, *padding], [*block_ids, *padding]], dtype=torch.int64)
        return index.to(self._memory.device, non_blocking=True)

    # ---- stores

    def store(
        self, pool: PoolView, block_ids: Sequence[int], slots: Sequence[int], after: Any
    ) -> npt.NDArray[np.bool_]:
        """See BlockMover."""
        if pool not in self._pinned:
            return self._staging().store(pool, block_ids, slots, after)
        for start in range(0, len(slots), STORE_BLOCKS):
            batch = slice(start, start + STORE_BLOCKS)
            self._store_batch(pool, block_ids[batch], slots[batch], after)
        return np.ones(len(slots), dtype=np.bool_)

    def _store_batch(
        self, pool: PoolView, block_ids: Sequence[int], slots: Sequence[int], after: Any
    ) -> None:
        memory = self._memory
        num_layers = len(memory.tensors)
        done = torch.cuda.Event(blocking=True)
        with torch.cuda.device(memory.device), torch.cuda.stream(self._store_stream):
            self._store_stream.wait_event(after)
            index = self._index(slots, block_ids)
            self._move(pool, index, len(slots), range(num_layers), is_load=False)
            done.record(self._store_stream)
            done.synchronize()
        pages = self._pages(pool, np.asarray(slots, dtype=np.int64), 0, num_layers)
        digests = np.empty((len(pages), 16), dtype=np.uint8)
        self._storer.digest(pages, self._page_bytes, digests)
        write_digests(
            pool, slots, memory, digests.reshape(len(slots), num_layers, memory.num_heads, 16)
        )

    def _pages(
        self, pool: PoolView, slots: npt.NDArray[np.int64], first_layer: int, end_layer: int
    ) -> npt.NDArray[np.uint64]:
        """Addresses of this rank's pages of some layers, by block, layer and head."""
        memory = self._memory
        layers = range(first_layer, end_layer)
        return pool.page_addresses(slots, memory.first_head, memory.num_heads, layers).reshape(-1)

    # ---- loads

    def load(
        self, pool: PoolView, slots: Sequence[int], block_ids: Sequence[int], digests: Digests
    ) -> npt.NDArray[np.bool_]:
        """See BlockMover."""
        return self.begin_load(pool, slots, block_ids, digests).wait()

    def begin_load(
        self, pool: PoolView, slots: Sequence[int], block_ids: Sequence[int], digests: Digests
    ) -> Landing:
        """See BlockMover."""
        if pool not in self._pinned:
            return Landed(self._staging().load(pool, slots, block_ids, digests))
        memory = self._memory
        num_layers = len(memory.tensors)
        landing = _DirectLanding(memory.device, num_layers)
        num_bytes = len(slots) * num_layers * self._run_bytes
        num_groups = min(num_layers, max(1, num_bytes // GROUP_BYTES))
        edges = [num_layers * number // num_groups for number in range(num_groups + 1)]
        stream, engine_stream = self._load_stream, torch.cuda.current_stream(memory.device)
        with torch.cuda.device(memory.device), torch.cuda.stream(stream):
            # The step before may still read what lay in these blocks.
            stream.wait_stream(engine_stream)
            index = self._index(slots, block_ids)
            landing.begun.record(stream)
            for first, end in itertools.pairwise(edges):
                self._move(pool, index, len(slots), range(first, end), is_load=True)
                landed = torch.cuda.Event(enable_timing=True, blocking=True)
                landed.record(stream)
                landing.groups.append((first, end, landed))
        landing.verified = self._verifier.submit(self._verify, pool, landing, slots, digests)
        return landing

    def _verify(
        self, pool: PoolView, landing: _DirectLanding, slots: Sequence[int], digests: Digests
    ) -> npt.NDArray[np.bool_]:
        """Which blocks have the bytes that they must have, each page after it has landed."""
        pages = np.asarray(slots, dtype=np.int64)
        is_good = np.ones(len(slots), dtype=np.bool_)
        for first, end, landed in landing.groups:
            wanted = np.ascontiguousarray(digests[:, first:end]).reshape(-1, 16)
            addresses = self._pages(pool, pages, first, end)
            ok = np.empty(len(addresses), dtype=np.bool_)
            landed.synchronize()
            self._loader.verify(addresses, self._page_bytes, wanted, ok)
            is_good &= ok.reshape(len(slots), -1).all(axis=1)
        return is_good
