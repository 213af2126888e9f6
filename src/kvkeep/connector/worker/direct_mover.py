"""Moves blocks between GPU memory and the pool itself, which the GPU's driver has pinned.

A load reads layer by layer on a stream of its own, and the attention of a layer waits for that
layer alone: most of the bus's time passes while the forward pass is still being launched. Digests
are compared meanwhile on the host, each page after the GPU has read it, so a page that a stray
writer changed before or while it was read is found as surely as one that had rotted. The load is
over, and its lease may be given back, when both are done. No thread of a load asks for the
interpreter's lock, which the engine holds while it launches (docs/decisions/0042).

A store gathers blocks on the GPU, where that takes next to no time, and leaves the bus to the
engines that copy: no processor of the GPU waits for it.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvkeep.connector.worker.cuda_mover import CudaMover
from kvkeep.connector.worker.landing import Landed, Landing
from kvkeep.connector.worker.movers import Digests, write_digests
from kvkeep.connector.worker.views import EngineMemory
from kvkeep.tiers.shared_memory import PoolView
from kvkeep.transfer.arrivals import Gate, Runs, Verification, begin_verification
from kvkeep.transfer.host_copy import open_copier

WORD_BYTES = 8
SPAN_BYTES = 64 << 20
"""Layers that are waited for together: a launch of its own for less costs more than it hides."""
VERIFY_THREADS = 8
"""Faster together than the bus (72 GB/s on an H200's host)."""
STORE_THREADS = 2


class Arrival(Protocol):
    """Blocks on their way to the GPU."""

    @property
    def gates(self) -> Sequence[Gate]:
        """Each opens when layers have landed and the pool is read for them no more."""
        ...

    def wait_for_layer(self, layer: int) -> None:
        """See Landing."""
        ...

    def wait(self) -> float:
        """Wait until nothing reads the pool any more; the seconds that the copies took."""
        ...


class Device(Protocol):
    """What moves the bytes: a GPU; in tests, something that needs none."""

    def pin(self, pool: PoolView) -> bool:
        """Have the driver pin a pool; False, and a line in the log, if it does not."""
        ...

    def snapshot(self) -> Any:
        """See BlockMover."""
        ...

    def begin_load(
        self,
        pool: PoolView,
        slots: Sequence[int],
        block_ids: Sequence[int],
        spans: Sequence[range],
    ) -> Arrival:
        """Begin to copy slots of a pinned pool to blocks, spans of layers one after the other."""
        ...

    def store(
        self, pool: PoolView, block_ids: Sequence[int], slots: Sequence[int], after: Any
    ) -> None:
        """Copy blocks to slots of a pinned pool; they are there on return, or after an error."""
        ...


@dataclass(frozen=True, slots=True)
class Rows:
    """A copy of equal rows, as the GPU's copy engine takes it."""

    target: int
    target_pitch: int
    """Bytes from a row to the next."""
    source: int
    width: int
    """Bytes of a row; in the source they lie one behind the other."""
    num_rows: int


def slot_rows(
    pool: PoolView, memory: EngineMemory, slots: Sequence[int], gathered: int
) -> Iterator[Rows]:
    """What brings blocks into their slots that were gathered layer by layer, block by block.

    Args:
        pool: Holds the slots.
        memory: Whose heads they are.
        slots: Of the blocks, in their order.
        gathered: Address of the first block.
    """
    layout = pool.geometry.layout
    width, pitch = memory.num_heads * layout.page_bytes, layout.num_heads * layout.page_bytes
    first = pool.base_address + pool.geometry.payload_offset + memory.first_head * layout.page_bytes
    for idx, slot in enumerate(slots):
        yield Rows(
            target=first + slot * layout.block_bytes,
            target_pitch=pitch,
            source=gathered + idx * layout.num_layers * width,
            width=width,
            num_rows=layout.num_layers,
        )


def layer_spans(num_layers: int, num_bytes: int) -> list[range]:
    """Layers that are waited for together, in a load of so many bytes; at least one each."""
    num_spans = min(num_layers, max(1, num_bytes // SPAN_BYTES))
    edges = [num_layers * number // num_spans for number in range(num_spans + 1)]
    return [range(edges[idx], edges[idx + 1]) for idx in range(num_spans)]


class _DirectLanding:
    """A load of some blocks by a ``DirectMover``."""

    def __init__(
        self, pool: PoolView, arrival: Arrival, verification: Verification, num_layers: int
    ) -> None:
        self._pool = pool
        """Stays mapped until then."""
        self._arrival = arrival
        self._verification = verification
        self._num_layers = num_layers
        self.seconds: float | None = 0.0

    def wait_for_layer(self, layer: int) -> None:
        """See Landing."""
        self._arrival.wait_for_layer(layer)

    def wait(self) -> npt.NDArray[np.bool_]:
        """See Landing."""
        # Whatever the engine launches next may reuse these blocks.
        self._arrival.wait_for_layer(self._num_layers)
        try:
            return self._verification.wait()
        finally:
            # Whatever became of the digests: nothing reads the pool any more.
            self.seconds = self._arrival.wait()


class DirectMover:
    """See BlockMover. Stores run on one thread, loads begin on the main thread.

    A pool that the driver did not pin is served through staging buffers.
    """

    form = None

    def __init__(self, memory: EngineMemory, device: Device | None = None) -> None:
        """Make a mover.

        Args:
            memory: This rank's blocks.
            device: That they lie on; None: the GPU.
        """
        if device is None:
            from kvkeep.connector.worker.direct_device import GpuDevice

            device = GpuDevice(memory)
        self._memory = memory
        self._device = device
        self._page_bytes = memory.tensors[0][0, 0].numel() * memory.tensors[0].element_size()
        self._staged: CudaMover | None = None
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
        if pool not in self._pinned and self._device.pin(pool):
            self._pinned.add(pool)

    def snapshot(self) -> Any:
        """An event behind the forward pass just launched."""
        return self._device.snapshot()

    def _staging(self) -> CudaMover:
        if self._staged is None:
            self._staged = CudaMover(self._memory)
        return self._staged

    # ---- stores

    def store(
        self, pool: PoolView, block_ids: Sequence[int], slots: Sequence[int], after: Any
    ) -> npt.NDArray[np.bool_]:
        """See BlockMover."""
        if pool not in self._pinned:
            return self._staging().store(pool, block_ids, slots, after)
        memory, num_layers = self._memory, len(self._memory.tensors)
        self._device.store(pool, block_ids, slots, after)
        pages = pool.page_addresses(
            np.asarray(slots, dtype=np.int64), memory.first_head, memory.num_heads
        ).reshape(-1)
        digests = np.empty((len(pages), 16), dtype=np.uint8)
        self._storer.digest(pages, self._page_bytes, digests)
        write_digests(
            pool, slots, memory, digests.reshape(len(slots), num_layers, memory.num_heads, 16)
        )
        return np.ones(len(slots), dtype=np.bool_)

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
        memory, num_layers = self._memory, len(self._memory.tensors)
        num_bytes = len(slots) * num_layers * memory.num_heads * self._page_bytes
        spans = layer_spans(num_layers, num_bytes)
        arrival = self._device.begin_load(pool, slots, block_ids, spans)
        with ExitStack() as undo:
            # Nobody would wait for it.
            undo.callback(arrival.wait)
            verification = begin_verification(
                self._runs(pool, slots), digests, arrival.gates, num_threads=VERIFY_THREADS
            )
            undo.pop_all()
        return _DirectLanding(pool, arrival, verification, num_layers)

    def _runs(self, pool: PoolView, slots: Sequence[int]) -> Runs:
        """Where this rank's pages of some slots lie."""
        memory, layout = self._memory, pool.geometry.layout
        wanted = np.asarray(slots, dtype=np.int64)
        return Runs(
            starts=pool.page_addresses(wanted, memory.first_head, 1, range(1)).reshape(-1),
            num_layers=layout.num_layers,
            layer_stride_bytes=layout.num_heads * layout.page_bytes,
            run_pages=memory.num_heads,
            page_bytes=layout.page_bytes,
        )
