"""The GPU of a ``DirectMover``: streams, events, the kernel, and the driver's own copies.

The driver (libcuda) is called by its C functions where torch has no word for what is meant: rows
into a slot, and a wait for an event on a thread that the interpreter does not know.
"""

import ctypes
import logging
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kvkeep.connector.worker.direct_mover import WORD_BYTES, Rows, slot_rows
from kvkeep.connector.worker.page_kernel import (
    GATHERED_AT_ONCE,
    GATHERING_WARPS,
    NUM_WARPS,
    WORDS_AT_ONCE,
    move_blocks,
)
from kvkeep.connector.worker.views import EngineMemory
from kvkeep.model.errors import UnavailableError
from kvkeep.tiers.shared_memory import PoolView
from kvkeep.transfer.arrivals import Gate

LOAD_PROGRAMS = 32
"""Fill the bus (51 of 55 GB/s on an H200) and leave the GPU's other processors to the engine."""
GATHER_PROGRAMS = 16
"""Gather in an eighth of the time that the bus takes for the same."""
GATHERED_BYTES = 64 << 20
"""Of GPU memory, for stores. A load that begins meanwhile shares the bus for a millisecond."""
PORTABLE_AND_MAPPED = 3
"""cudaHostRegisterPortable | cudaHostRegisterMapped."""
HOST, DEVICE = 1, 2
"""CU_MEMORYTYPE_HOST, CU_MEMORYTYPE_DEVICE."""

log = logging.getLogger(__name__)


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D of cuda.h."""

    _fields_ = [
        ("src_x", ctypes.c_size_t), ("src_y", ctypes.c_size_t), ("src_kind", ctypes.c_int),
        ("src_host", ctypes.c_void_p), ("src_device", ctypes.c_uint64),
        ("src_array", ctypes.c_void_p), ("src_pitch", ctypes.c_size_t),
        ("dst_x", ctypes.c_size_t), ("dst_y", ctypes.c_size_t), ("dst_kind", ctypes.c_int),
        ("dst_host", ctypes.c_void_p), ("dst_device", ctypes.c_uint64),
        ("dst_array", ctypes.c_void_p), ("dst_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t), ("height", ctypes.c_size_t),
    ]  # fmt: skip


class _Driver:
    """A few functions of libcuda, for the context that is current on the calling thread."""

    def __init__(self) -> None:
        # They return at once: giving the interpreter's lock away for each would cost the calling
        # thread up to its switching interval, each time.
        library = ctypes.PyDLL("libcuda.so.1")
        self._copy_rows, self._copy = library.cuMemcpy2DAsync_v2, library.cuMemcpyDtoHAsync_v2
        self._copy_rows.argtypes = [ctypes.POINTER(_Copy2D), ctypes.c_void_p]
        self._copy.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
        self.wait_for_event = self._address(library.cuEventSynchronize)
        self.use_context = self._address(library.cuCtxSetCurrent)
        context = ctypes.c_void_p()
        self._check(library.cuCtxGetCurrent(ctypes.byref(context)))
        self.context = int(context.value or 0)

    @staticmethod
    def _address(function: Any) -> int:
        return int(ctypes.cast(function, ctypes.c_void_p).value or 0)

    @staticmethod
    def _check(error: int) -> None:
        if error:
            raise UnavailableError(f"the GPU's driver refused a call of kvkeep's: CUDA {error}")

    def copy_to_host(self, rows: Rows, stream: int) -> None:
        """Queue a copy from the GPU to pinned memory."""
        if rows.target_pitch == rows.width:
            num_bytes = rows.width * rows.num_rows
            self._check(self._copy(rows.target, rows.source, num_bytes, stream))
            return
        copy = _Copy2D(
            src_kind=DEVICE, src_device=rows.source, src_pitch=rows.width,
            dst_kind=HOST, dst_host=rows.target, dst_pitch=rows.target_pitch,
            width=rows.width, height=rows.num_rows,
        )  # fmt: skip
        self._check(self._copy_rows(ctypes.byref(copy), stream))


class _GpuArrival:
    """See Arrival. Events behind spans of layers."""

    def __init__(self, device: torch.device, driver: _Driver) -> None:
        self._device = device
        self._driver = driver
        self.begun = torch.cuda.Event(enable_timing=True)
        self._spans: list[tuple[range, Any]] = []
        self._num_awaited = 0

    def landed(self, layers: range, stream: Any) -> None:
        """What was queued on the stream so far brings these layers."""
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(stream)
        self._spans.append((layers, event))

    @property
    def gates(self) -> list[Gate]:
        """See Arrival."""
        driver = self._driver
        # The thread that waits is the interpreter's nor torch's: it has no context yet.
        return [
            Gate(driver.use_context, driver.context, 0),
            *(
                Gate(driver.wait_for_event, int(event.cuda_event), layers.stop)
                for layers, event in self._spans
            ),
        ]

    def wait_for_layer(self, layer: int) -> None:
        """See Arrival."""
        while self._num_awaited < len(self._spans):
            layers, event = self._spans[self._num_awaited]
            if layers.start > layer:
                return
            torch.cuda.current_stream(self._device).wait_event(event)
            self._num_awaited += 1

    def wait(self) -> float:
        """See Arrival."""
        last = self._spans[-1][1]
        last.synchronize()
        return float(self.begun.elapsed_time(last)) / 1e3


class GpuDevice:
    """See Device. Made on the main thread; stores come from one thread, loads from the main one."""

    def __init__(self, memory: EngineMemory) -> None:
        self._memory = memory
        self._page_bytes = memory.tensors[0][0, 0].numel() * memory.tensors[0].element_size()
        self._run_bytes = memory.num_heads * self._page_bytes
        self._block_bytes = len(memory.tensors) * self._run_bytes
        self._layers = torch.from_numpy(memory.layer_addresses.astype(np.int64)).to(memory.device)
        # The stream of stores has the lowest priority there is, as the engine's own has.
        self._store_stream = torch.cuda.Stream(device=memory.device)
        self._load_stream = torch.cuda.Stream(device=memory.device, priority=-1)
        self._num_gathered = max(1, GATHERED_BYTES // self._block_bytes)
        self._gathered = torch.empty(
            self._num_gathered * self._block_bytes, dtype=torch.uint8, device=memory.device
        )
        with torch.cuda.device(memory.device):
            self._driver = _Driver()

    def pin(self, pool: PoolView) -> bool:
        """See Device."""
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
            return False
        finalizer = weakref.finalize(pool, runtime.cudaHostUnregister, pool.base_address)
        # The driver goes before the interpreter's last mappings do.
        finalizer.atexit = False
        return True

    def snapshot(self) -> Any:
        """See Device."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._memory.device))
        return event

    def _index(self, slots: Sequence[int], block_ids: Sequence[int]) -> torch.Tensor:
        """int64 ``[2, num_blocks or one more]`` on the GPU: slots, engine blocks.

        Of an even length, so that both rows begin at 16 bytes: for others the kernel would be
        compiled anew, in the midst of service.
        """
        padding = [0] * (len(slots) % 2)
        index = torch.tensor([[*slots, *padding], [*block_ids, *padding]], dtype=torch.int64)
        return index.to(self._memory.device, non_blocking=True)

    # ---- loads

    def begin_load(
        self,
        pool: PoolView,
        slots: Sequence[int],
        block_ids: Sequence[int],
        spans: Sequence[range],
    ) -> _GpuArrival:
        """See Device."""
        memory, stream = self._memory, self._load_stream
        arrival = _GpuArrival(memory.device, self._driver)
        engine_stream = torch.cuda.current_stream(memory.device)
        with torch.cuda.device(memory.device), torch.cuda.stream(stream):
            # The step before may still read what lay in these blocks.
            stream.wait_stream(engine_stream)
            index = self._index(slots, block_ids)
            arrival.begun.record(stream)
            for layers in spans:
                self._queue_load(pool, index, len(slots), layers)
                arrival.landed(layers, stream)
        return arrival

    def _queue_load(
        self, pool: PoolView, index: torch.Tensor, num_blocks: int, layers: range
    ) -> None:
        memory, layout = self._memory, pool.geometry.layout
        move_blocks[(LOAD_PROGRAMS,)](
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
            IS_LOAD=True,
            AT_ONCE=WORDS_AT_ONCE,
            num_warps=NUM_WARPS,
        )

    # ---- stores

    def store(
        self, pool: PoolView, block_ids: Sequence[int], slots: Sequence[int], after: Any
    ) -> None:
        """See Device."""
        memory, stream = self._memory, self._store_stream
        done = torch.cuda.Event(blocking=True)
        with torch.cuda.device(memory.device), torch.cuda.stream(stream):
            stream.wait_event(after)
            try:
                for start in range(0, len(slots), self._num_gathered):
                    batch = slice(start, start + self._num_gathered)
                    self._queue_gather(block_ids[batch])
                    for rows in slot_rows(pool, memory, slots[batch], self._gathered.data_ptr()):
                        self._driver.copy_to_host(rows, stream.cuda_stream)
            finally:
                done.record(stream)
                done.synchronize()

    def _queue_gather(self, block_ids: Sequence[int]) -> None:
        """Blocks one behind the other, each layer by layer, as in slots of this rank's heads."""
        memory, num_layers = self._memory, len(self._memory.tensors)
        index = self._index(range(len(block_ids)), block_ids)
        move_blocks[(GATHER_PROGRAMS,)](
            self._gathered.data_ptr(),
            self._layers,
            index[0],
            index[1],
            len(block_ids),
            0,
            num_layers,
            self._block_bytes // WORD_BYTES,
            self._run_bytes // WORD_BYTES,
            0,
            memory.block_stride // WORD_BYTES,
            RUN_WORDS=self._run_bytes // WORD_BYTES,
            IS_LOAD=False,
            AT_ONCE=GATHERED_AT_ONCE,
            num_warps=GATHERING_WARPS,
        )
