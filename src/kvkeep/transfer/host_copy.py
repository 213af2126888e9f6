"""Copies between two host memories: an engine's KV tensors on a CPU, and the pool.

Two implementations of ``PageCopier``: ``CompiledCopier`` runs at memory speed outside the
interpreter's lock, on threads of its own that end with the call; ``ReferenceCopier`` does the same
page by page where the C extension could not be built.
"""

import ctypes
import logging
import os
from collections.abc import Collection, Sequence
from typing import Any, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvkeep.transfer.base import (
    DIGEST_BYTES,
    PAGE_BYTES_MAX,
    PAGES_MAX,
    Addresses,
    Digests,
    Flags,
    PageCopier,
)

THREADS_MAX: Final = 16
"""Memory is saturated long before; the C extension holds this number of thread handles."""

CPUS_MAX: Final = 1024
"""CPUs in a ``cpu_set_t`` of glibc."""

logger = logging.getLogger(__name__)


def open_copier(*, num_threads: int = 1, cpus: Collection[int] | None = None) -> PageCopier:
    """Return the fastest copier this machine has.

    Args:
        num_threads: Threads that share a call's pages, the calling one included; 1 to
            ``THREADS_MAX``. The reference copier works on the calling thread alone.
        cpus: CPUs on which the other threads may run; ``None`` for all that the process's cpuset
            allows, even where the calling thread is bound to a core, as vLLM binds its own.

    Raises:
        ValueError: A number is out of range; the sentence says which.
    """
    try:
        return CompiledCopier(num_threads=num_threads, cpus=cpus)
    except ImportError as error:
        logger.warning(
            "copies of KV run page by page in Python, several times slower: %s. "
            "Install gcc, python3-dev and libxxhash-dev, then reinstall kvkeep.",
            error,
        )
        return ReferenceCopier()


def addresses(
    layer_bases: Addresses,
    *,
    block_stride_bytes: int,
    head_stride_bytes: int,
    block_ids: Sequence[int] | NDArray[np.integer[Any]],
    head_range: range,
) -> NDArray[np.uint64]:
    """Return where the head pages of some blocks lie.

    The same arithmetic serves both ends: an engine's tensors have one base per layer, a block of
    the pool has its layers one behind the other.

    Args:
        layer_bases: uint64 ``[num_layers]``: address of head 0 of block 0 in each layer.
        block_stride_bytes: From a block to the next one in the same layer; at least 0.
        head_stride_bytes: From a KV head to the next one in the same block; at least 0.
        block_ids: Blocks, in the order wanted; at least 0 each.
        head_range: KV heads, in the order wanted.

    Returns:
        uint64 ``[num_blocks, num_layers, num_heads]``, C-contiguous; ravel it for a copier.

    Raises:
        ValueError: A stride, block id or head is below 0.
    """
    blocks = np.asarray(block_ids, dtype=np.int64)
    heads = np.asarray(head_range, dtype=np.int64)
    strides_bytes = (block_stride_bytes, head_stride_bytes)
    if min(strides_bytes) < 0 or min(blocks.min(initial=0), heads.min(initial=0)) < 0:
        raise ValueError("strides, block ids and heads of pages are counted from 0 upwards")
    block_offsets = blocks.astype(np.uint64) * np.uint64(block_stride_bytes)
    head_offsets = heads.astype(np.uint64) * np.uint64(head_stride_bytes)
    # One large addition: the small one first, and no large array in between.
    pages = layer_bases[:, None] + head_offsets[None, :]
    return block_offsets[:, None, None] + pages[None]


class CompiledCopier:
    """A ``PageCopier`` that runs in C, on one or more threads, outside the interpreter's lock."""

    def __init__(self, *, num_threads: int = 1, cpus: Collection[int] | None = None) -> None:
        from kvkeep.transfer import _pages

        if not 1 <= num_threads <= THREADS_MAX:
            raise ValueError(f"num_threads must be 1 to {THREADS_MAX}. num_threads={num_threads}")
        self._pages = _pages
        self._num_threads = num_threads
        self._cpu_mask = cpu_mask(cpus)

    def store(
        self, source: Addresses, target: Addresses, page_bytes: int, digests_out: Digests
    ) -> None:
        """See ``PageCopier.store``."""
        _check_page_bytes(page_bytes)
        _check_pair(source, target)
        _check_digests("digests_out", digests_out, len(source), is_output=True)
        self._pages.store(
            source, target, page_bytes, digests_out, self._num_threads, self._cpu_mask
        )

    def load(
        self,
        source: Addresses,
        target: Addresses,
        page_bytes: int,
        digests: Digests,
        ok_out: Flags,
    ) -> int:
        """See ``PageCopier.load``."""
        _check_page_bytes(page_bytes)
        _check_pair(source, target)
        _check_digests("digests", digests, len(source), is_output=False)
        _check_flags(ok_out, len(source))
        return self._pages.load(
            source, target, page_bytes, digests, ok_out, self._num_threads, self._cpu_mask
        )

    def verify(self, addresses: Addresses, page_bytes: int, digests: Digests, ok_out: Flags) -> int:
        """See ``PageCopier.verify``."""
        _check_page_bytes(page_bytes)
        _check_addresses("addresses", addresses)
        _check_digests("digests", digests, len(addresses), is_output=False)
        _check_flags(ok_out, len(addresses))
        return self._pages.verify(
            addresses, page_bytes, digests, ok_out, self._num_threads, self._cpu_mask
        )

    def digest(self, addresses: Addresses, page_bytes: int, digests_out: Digests) -> None:
        """See ``PageCopier.digest``."""
        _check_page_bytes(page_bytes)
        _check_addresses("addresses", addresses)
        _check_digests("digests_out", digests_out, len(addresses), is_output=True)
        self._pages.digest(addresses, page_bytes, digests_out, self._num_threads, self._cpu_mask)


class ReferenceCopier:
    """A ``PageCopier`` in plain Python: what the compiled one is compared with."""

    def store(
        self, source: Addresses, target: Addresses, page_bytes: int, digests_out: Digests
    ) -> None:
        """See ``PageCopier.store``."""
        _check_page_bytes(page_bytes)
        _check_pair(source, target)
        _check_digests("digests_out", digests_out, len(source), is_output=True)
        for page_idx, (read_at, write_at) in enumerate(
            zip(source.tolist(), target.tolist(), strict=True)
        ):
            digests_out[page_idx] = _digest(_page(read_at, page_bytes))
            ctypes.memmove(write_at, read_at, page_bytes)

    def load(
        self,
        source: Addresses,
        target: Addresses,
        page_bytes: int,
        digests: Digests,
        ok_out: Flags,
    ) -> int:
        """See ``PageCopier.load``."""
        _check_page_bytes(page_bytes)
        _check_pair(source, target)
        _check_digests("digests", digests, len(source), is_output=False)
        _check_flags(ok_out, len(source))
        bounce = (ctypes.c_uint8 * page_bytes)()
        num_bad = 0
        for page_idx, (read_at, write_at) in enumerate(
            zip(source.tolist(), target.tolist(), strict=True)
        ):
            ctypes.memmove(bounce, read_at, page_bytes)
            is_ok = np.array_equal(_digest(bounce), digests[page_idx])
            if is_ok:
                ctypes.memmove(write_at, bounce, page_bytes)
            ok_out[page_idx] = is_ok
            num_bad += not is_ok
        return num_bad

    def verify(self, addresses: Addresses, page_bytes: int, digests: Digests, ok_out: Flags) -> int:
        """See ``PageCopier.verify``."""
        _check_page_bytes(page_bytes)
        _check_addresses("addresses", addresses)
        _check_digests("digests", digests, len(addresses), is_output=False)
        _check_flags(ok_out, len(addresses))
        num_bad = 0
        for page_idx, read_at in enumerate(addresses.tolist()):
            is_ok = np.array_equal(_digest(_page(read_at, page_bytes)), digests[page_idx])
            ok_out[page_idx] = is_ok
            num_bad += not is_ok
        return num_bad

    def digest(self, addresses: Addresses, page_bytes: int, digests_out: Digests) -> None:
        """See ``PageCopier.digest``."""
        _check_page_bytes(page_bytes)
        _check_addresses("addresses", addresses)
        _check_digests("digests_out", digests_out, len(addresses), is_output=True)
        for page_idx, read_at in enumerate(addresses.tolist()):
            digests_out[page_idx] = _digest(_page(read_at, page_bytes))


def _page(address: int, page_bytes: int) -> "ctypes.Array[ctypes.c_uint8]":
    return (ctypes.c_uint8 * page_bytes).from_address(address)


def _digest(page: "ctypes.Array[ctypes.c_uint8]") -> NDArray[np.uint8]:
    return np.frombuffer(xxhash.xxh3_128_digest(page), dtype=np.uint8)


def cpu_mask(cpus: Collection[int] | None) -> bytes:
    """Return a ``cpu_set_t``; the kernel takes out what the process's cpuset does not allow."""
    if cpus is None:
        return b"\xff" * (CPUS_MAX // 8)
    if not cpus or not all(0 <= cpu < CPUS_MAX for cpu in cpus):
        allowed = sorted(os.sched_getaffinity(0))
        raise ValueError(f"cpus must name CPUs of this machine, such as {allowed}. cpus={cpus}")
    return sum(1 << cpu for cpu in set(cpus)).to_bytes(CPUS_MAX // 8, "little")


def _check_page_bytes(page_bytes: int) -> None:
    if not 1 <= page_bytes <= PAGE_BYTES_MAX:
        raise ValueError(f"page_bytes must be 1 to {PAGE_BYTES_MAX}. page_bytes={page_bytes}")


def _check_pair(source: Addresses, target: Addresses) -> None:
    _check_addresses("source", source)
    _check_addresses("target", target)
    if len(source) != len(target):
        raise ValueError(
            "source and target must have as many pages. "
            f"source={len(source)} pages, target={len(target)} pages"
        )


def _check_addresses(name: str, pages: Addresses) -> None:
    fits = pages.ndim == 1 and pages.dtype == np.uint64 and len(pages) <= PAGES_MAX
    if not (fits and pages.flags.c_contiguous):
        raise ValueError(
            f"{name} must be uint64 [num_pages], C-contiguous, at most {PAGES_MAX} pages. "
            f"{name} is {describe_array(pages)}"
        )


def _check_digests(name: str, digests: Digests, num_pages: int, *, is_output: bool) -> None:
    fits = digests.shape == (num_pages, DIGEST_BYTES) and digests.dtype == np.uint8
    if not (fits and digests.flags.c_contiguous and (digests.flags.writeable or not is_output)):
        kind = "C-contiguous and writable" if is_output else "C-contiguous"
        raise ValueError(
            f"{name} must be uint8 [{num_pages}, {DIGEST_BYTES}], {kind}. "
            f"{name} is {describe_array(digests)}"
        )


def _check_flags(ok_out: Flags, num_pages: int) -> None:
    fits = ok_out.shape == (num_pages,) and ok_out.dtype in (np.bool_, np.uint8)
    if not (fits and ok_out.flags.c_contiguous and ok_out.flags.writeable):
        raise ValueError(
            f"ok_out must be bool or uint8 [{num_pages}], C-contiguous and writable. "
            f"ok_out is {describe_array(ok_out)}"
        )


def describe_array(array: NDArray[Any]) -> str:
    """Say what an array is that does not fit."""
    contiguous = "C-contiguous" if array.flags.c_contiguous else "not C-contiguous"
    writable = "writable" if array.flags.writeable else "read-only"
    return f"{array.dtype} {list(array.shape)}, {contiguous}, {writable}"
