"""Pages compared with their digests where they lie, layer by layer, as a reader is done with them.

The reader is somebody else, such as a GPU that fetches the pages over the bus. A ``Gate`` tells
when it has read some layers; only then are they compared, so a page that anyone changed before or
while it was read is found. With the C extension neither the gates nor the comparing ever need the
interpreter's lock, which an engine's thread holds while it launches a forward pass.
"""

import ctypes
import logging
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvkeep.model.errors import UnavailableError
from kvkeep.transfer.base import (
    DIGEST_BYTES,
    PAGE_BYTES_MAX,
    PAGES_MAX,
    Addresses,
    Digests,
)
from kvkeep.transfer.host_copy import THREADS_MAX, ReferenceCopier, cpu_mask, describe_array

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Runs:
    """Pages of some blocks; those of one layer of a block lie one behind the other."""

    starts: Addresses
    """uint64 ``[num_blocks]``: the first page of layer 0 of each block."""
    num_layers: int
    layer_stride_bytes: int
    """From a layer of a block to the next."""
    run_pages: int
    """Pages of a layer of a block."""
    page_bytes: int

    def pages(self, layers: range) -> Addresses:
        """Addresses of the pages of some layers: uint64 ``[num_blocks * layers * run_pages]``."""
        offsets = (
            np.asarray(layers, dtype=np.uint64)[:, None] * np.uint64(self.layer_stride_bytes)
            + np.arange(self.run_pages, dtype=np.uint64) * np.uint64(self.page_bytes)
        )  # fmt: skip
        return (self.starts[:, None, None] + offsets).reshape(-1)


@dataclass(frozen=True, slots=True)
class Gate:
    """What has to be called before further layers may be looked at."""

    function: int
    """Address of a C function, ``int f(void *)``, that returns 0 when they may be; it may block.
    Called once, on a thread of its own that holds no lock of the interpreter's."""
    argument: int
    """What it is given."""
    end_layer: int
    """The layers before this one are open then."""


class Verification(Protocol):
    """A comparison that was begun; what it reads stays mapped until ``wait`` has returned."""

    def wait(self) -> NDArray[np.bool_]:
        """Wait until nothing is read any more; may be called again.

        Returns:
            bool ``[num_blocks]``: whether every page of the block has its digest.

        Raises:
            UnavailableError: A gate failed; nothing is known of any block.
        """
        ...


def begin_verification(
    runs: Runs,
    digests: NDArray[np.uint8],
    gates: Sequence[Gate],
    *,
    num_threads: int,
    cpus: Collection[int] | None = None,
) -> Verification:
    """Begin to compare; returns at once, without having looked at any page.

    Args:
        runs: Where the pages lie.
        digests: uint8 ``[num_blocks, num_layers, run_pages, 16]``, C-contiguous: what each page
            must have; not changed until ``wait`` has returned.
        gates: In the order in which they are passed; the last opens the last layer.
        num_threads: That compare, 1 to ``THREADS_MAX``; without the extension it is one.
        cpus: On which they may run; None: all.

    Raises:
        ValueError: Something does not fit; the sentence says what. Nothing was begun.
    """
    _check(runs, digests, gates, num_threads)
    mask = cpu_mask(cpus)
    try:
        return _CompiledVerification(runs, digests, gates, num_threads, mask)
    except ImportError as error:
        logger.debug("pages are compared in Python: %s", error)
        return ReferenceVerification(runs, digests, gates)


class _CompiledVerification:
    """See Verification. In C."""

    def __init__(
        self,
        runs: Runs,
        digests: NDArray[np.uint8],
        gates: Sequence[Gate],
        num_threads: int,
        mask: bytes,
    ) -> None:
        from kvkeep.transfer import _pages

        self._pages = _pages
        self._is_ok = np.empty(len(runs.starts), dtype=np.bool_)
        rows = [(gate.function, gate.argument, gate.end_layer) for gate in gates]
        self._running = _pages.begin_verify(
            runs.starts,
            runs.num_layers,
            runs.layer_stride_bytes,
            runs.run_pages,
            runs.page_bytes,
            digests,
            self._is_ok,
            np.array(rows, dtype=np.uint64),
            num_threads,
            mask,
        )

    def wait(self) -> NDArray[np.bool_]:
        """See Verification."""
        _raise_if(self._pages.end_verify(self._running))
        return self._is_ok


class ReferenceVerification:
    """See Verification. In Python, on one thread: what the compiled one is compared with."""

    def __init__(self, runs: Runs, digests: NDArray[np.uint8], gates: Sequence[Gate]) -> None:
        self._runs, self._digests, self._gates = runs, digests, list(gates)
        self._is_ok = np.ones(len(runs.starts), dtype=np.bool_)
        self._error = -1
        """Until all was compared: whatever ends the thread before, no block is good."""
        self._thread = threading.Thread(target=self._run, name="kvkeep-verify", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        first_layer = 0
        for gate in self._gates:
            function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(gate.function)
            error = int(function(gate.argument))
            if error:
                self._error = error
                return
            if gate.end_layer > first_layer and len(self._runs.starts):
                self._compare(range(first_layer, gate.end_layer))
            first_layer = gate.end_layer
        self._error = 0

    def _compare(self, layers: range) -> None:
        pages = self._runs.pages(layers)
        wanted: Digests = np.ascontiguousarray(self._digests[:, layers.start : layers.stop])
        is_ok = np.empty(len(pages), dtype=np.bool_)
        ReferenceCopier().verify(
            pages, self._runs.page_bytes, wanted.reshape(-1, DIGEST_BYTES), is_ok
        )
        self._is_ok &= is_ok.reshape(len(self._runs.starts), -1).all(axis=1)

    def wait(self) -> NDArray[np.bool_]:
        """See Verification."""
        self._thread.join()
        _raise_if(self._error)
        return self._is_ok


def _raise_if(error: int) -> None:
    if error:
        raise UnavailableError(f"pages were not compared: what reads them failed with code {error}")


def _check(runs: Runs, digests: NDArray[np.uint8], gates: Sequence[Gate], num_threads: int) -> None:
    if not 1 <= num_threads <= THREADS_MAX:
        raise ValueError(f"num_threads must be 1 to {THREADS_MAX}. num_threads={num_threads}")
    if not 1 <= runs.page_bytes <= PAGE_BYTES_MAX:
        raise ValueError(f"page_bytes must be 1 to {PAGE_BYTES_MAX}. page_bytes={runs.page_bytes}")
    starts = runs.starts
    if starts.ndim != 1 or starts.dtype != np.uint64 or not starts.flags.c_contiguous:
        raise ValueError(
            f"starts must be uint64 [num_blocks], C-contiguous. starts is {describe_array(starts)}"
        )
    numbers = runs.num_layers, runs.layer_stride_bytes, runs.run_pages
    shape = (len(starts), runs.num_layers, runs.run_pages, DIGEST_BYTES)
    if min(numbers) < 1 or int(np.prod(shape[:3], dtype=object)) > PAGES_MAX:
        raise ValueError(
            f"layers, their stride and their pages must be at least 1, and at most {PAGES_MAX} "
            f"pages in all. {shape[0]} blocks of layers, stride, pages={numbers}"
        )
    if digests.shape != shape or digests.dtype != np.uint8 or not digests.flags.c_contiguous:
        raise ValueError(
            f"digests must be uint8 {list(shape)}, C-contiguous. "
            f"digests is {describe_array(digests)}"
        )
    ends = [0, *(gate.end_layer for gate in gates)]
    if ends != sorted(ends) or ends[-1] != runs.num_layers or not all(g.function for g in gates):
        raise ValueError(
            "gates must be functions in the order of their layers, the last at the last. "
            f"layers={runs.num_layers}, gates open {ends[1:]}"
        )
