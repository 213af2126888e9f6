"""How fast head pages move between an engine's memory and the pool, against the machine's memcpy.

The pages are those of one 3,500-token prompt of SmolLM2-135M (78 MB, beyond any L3 here), scattered
as an engine's block table scatters them. The peer is the C library's memcpy of as many bytes in one
piece per thread, between other parts of the same two mappings, in turns with the copier.

    python -m benchmarks.copies
"""

import contextlib
import ctypes
import mmap
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from benchmarks.figures import Target, emit, median_figure
from kvkeep.transfer.base import DIGEST_BYTES
from kvkeep.transfer.host_copy import CompiledCopier, addresses

NUM_LAYERS: Final = 30
NUM_HEADS: Final = 3
PAGE_BYTES: Final = 8192
NUM_BLOCKS: Final = 109
"""Whole blocks of 32 tokens in a prompt of 3,500."""
POOL_BLOCKS: Final = 160
"""Blocks there are on either side; the prompt's are a random choice."""
ROUNDS: Final = 21
SHARE_OF_MEMCPY_MIN: Final = 0.70
WORKING_BYTES: Final = NUM_BLOCKS * NUM_LAYERS * NUM_HEADS * PAGE_BYTES
BLOCKS_BYTES: Final = POOL_BLOCKS * NUM_LAYERS * NUM_HEADS * PAGE_BYTES
MEMORY_BYTES: Final = BLOCKS_BYTES + WORKING_BYTES
"""Blocks first; behind them what the peer copies."""

Run = Callable[[], float]
"""Does the work once; returns the seconds it took."""


@dataclass(frozen=True)
class Bench:
    """The two memories and the prompt's pages in them."""

    engine: NDArray[np.uint8]
    """uint8 ``[MEMORY_BYTES]``: anonymous memory; a layer's blocks lie together."""
    pool: NDArray[np.uint8]
    """uint8 ``[MEMORY_BYTES]``: a file in shared memory; a block's layers lie together."""
    engine_pages: NDArray[np.uint64]
    """uint64 ``[num_pages]``"""
    pool_pages: NDArray[np.uint64]
    """uint64 ``[num_pages]``"""
    engine_block_ids: list[int]


def main() -> int:
    """Prove that copies and digests are right, then measure; 0 whether or not targets are met."""
    with opened_bench() as bench:
        digests = prove_answers(bench)
        for num_threads in range(1, min(2, os.cpu_count() or 1) + 1):
            measure_copies(bench, digests, num_threads)
        measure_addresses(bench)
    return 0


@contextlib.contextmanager
def opened_bench() -> Iterator[Bench]:
    """Map and fill both memories; the pool's file is gone afterwards."""
    chance = random.Random(0)
    engine_map = mmap.mmap(-1, MEMORY_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with tempfile.TemporaryDirectory(prefix="kvkeep-bench-", dir="/dev/shm") as folder:
        path = Path(folder) / "pool"
        path.touch()
        os.truncate(path, MEMORY_BYTES)
        with path.open("r+b") as file:
            pool_map = mmap.mmap(file.fileno(), MEMORY_BYTES)
        for memory in (engine_map, pool_map):
            with contextlib.suppress(OSError):  # a kernel without huge pages: slower, still right
                memory.madvise(mmap.MADV_HUGEPAGE)
        engine = np.frombuffer(engine_map, dtype=np.uint8)
        pool = np.frombuffer(pool_map, dtype=np.uint8)
        engine[:] = np.random.default_rng(0).integers(0, 256, MEMORY_BYTES, dtype=np.uint8)
        pool[:] = 0
        engine_block_ids = chance.sample(range(POOL_BLOCKS), NUM_BLOCKS)
        yield Bench(
            engine=engine,
            pool=pool,
            engine_pages=locate_in_engine(engine, engine_block_ids).ravel(),
            pool_pages=locate_in_pool(pool, chance.sample(range(POOL_BLOCKS), NUM_BLOCKS)).ravel(),
            engine_block_ids=engine_block_ids,
        )


def locate_in_engine(engine: NDArray[np.uint8], block_ids: list[int]) -> NDArray[np.uint64]:
    """Return uint64 ``[num_blocks, num_layers, num_heads]``: a layer's blocks lie together."""
    layer_bytes = POOL_BLOCKS * NUM_HEADS * PAGE_BYTES
    layers = np.arange(NUM_LAYERS, dtype=np.uint64) * np.uint64(layer_bytes)
    return addresses(
        layers + np.uint64(engine.ctypes.data),
        block_stride_bytes=NUM_HEADS * PAGE_BYTES,
        head_stride_bytes=PAGE_BYTES,
        block_ids=block_ids,
        head_range=range(NUM_HEADS),
    )


def locate_in_pool(pool: NDArray[np.uint8], block_ids: list[int]) -> NDArray[np.uint64]:
    """Return uint64 ``[num_blocks, num_layers, num_heads]``: a block's layers lie together."""
    layers = np.arange(NUM_LAYERS, dtype=np.uint64) * np.uint64(NUM_HEADS * PAGE_BYTES)
    return addresses(
        layers + np.uint64(pool.ctypes.data),
        block_stride_bytes=NUM_LAYERS * NUM_HEADS * PAGE_BYTES,
        head_stride_bytes=PAGE_BYTES,
        block_ids=block_ids,
        head_range=range(NUM_HEADS),
    )


def prove_answers(bench: Bench) -> NDArray[np.uint8]:
    """Store, damage one page, load; return the digests, uint8 ``[num_pages, 16]``.

    Raises:
        AssertionError: A byte, a digest or the verdict about the damaged page is wrong.
    """
    num_pages = len(bench.engine_pages)
    copier = CompiledCopier(num_threads=2)
    digests = np.zeros((num_pages, DIGEST_BYTES), dtype=np.uint8)
    copier.store(bench.engine_pages, bench.pool_pages, PAGE_BYTES, digests)
    expected = [
        xxhash.xxh3_128_digest(ctypes.string_at(address, PAGE_BYTES))
        for address in bench.engine_pages.tolist()
    ]
    assert expected == [bytes(digest) for digest in digests], "digests differ from python-xxhash"

    before = bench.engine.copy()
    for address in bench.engine_pages.tolist():
        ctypes.memset(address, 0, PAGE_BYTES)
    damaged = ctypes.c_uint8.from_address(int(bench.pool_pages[1234]) + 77)
    damaged.value ^= 1
    is_ok = np.zeros(num_pages, dtype=np.bool_)
    num_bad = copier.load(bench.pool_pages, bench.engine_pages, PAGE_BYTES, digests, is_ok)
    assert (num_bad, np.flatnonzero(~is_ok).tolist()) == (1, [1234]), "the damaged page passed"
    damaged.value ^= 1
    assert copier.load(bench.pool_pages, bench.engine_pages, PAGE_BYTES, digests, is_ok) == 0
    assert np.array_equal(before, bench.engine), "loaded bytes differ from the stored ones"
    return digests


def measure_copies(bench: Bench, digests: NDArray[np.uint8], num_threads: int) -> None:
    """Emit the figures of store, load and verify with one number of threads."""
    copier = CompiledCopier(num_threads=num_threads)
    is_ok = np.zeros(len(digests), dtype=np.bool_)
    into = np.zeros_like(digests)
    engine, pool = bench.engine_pages, bench.pool_pages
    runs: dict[str, Run] = {
        "memcpy_to_pool": lambda: copied_s(bench.engine, bench.pool, num_threads),
        "store": lambda: timed_s(lambda: copier.store(engine, pool, PAGE_BYTES, into)),
        "memcpy_to_engine": lambda: copied_s(bench.pool, bench.engine, num_threads),
        "load": lambda: timed_s(lambda: copier.load(pool, engine, PAGE_BYTES, digests, is_ok)),
        "verify": lambda: timed_s(lambda: copier.verify(pool, PAGE_BYTES, digests, is_ok)),
    }
    seconds = in_turns(runs)
    assert is_ok.all(), "a measured load or verify found a bad page"
    assert np.array_equal(into, digests), "a measured store made another digest"
    speeds = {name: [WORKING_BYTES / 1e9 / s for s in values] for name, values in seconds.items()}
    for name, peer in (("store", "memcpy_to_pool"), ("load", "memcpy_to_engine")):
        emit(
            median_figure(
                f"copies.{name}.threads_{num_threads}",
                speeds[name],
                "GB/s",
                peer_values=speeds[peer],
                peer_name=f"memcpy, {num_threads} thread(s)",
                target=Target("ratio", ">=", SHARE_OF_MEMCPY_MIN),
            )
        )
    emit(median_figure(f"copies.verify.threads_{num_threads}", speeds["verify"], "GB/s"))
    load_ms = [s * 1e3 for s in seconds["load"]]
    emit(median_figure(f"copies.load_3500_tokens.threads_{num_threads}", load_ms, "ms"))


def measure_addresses(bench: Bench) -> None:
    """Emit what it costs to say where the prompt's pages lie, on one side."""
    values_us = [
        timed_s(lambda: locate_in_engine(bench.engine, bench.engine_block_ids)) * 1e6
        for _ in range(ROUNDS)
    ]
    emit(median_figure("copies.addresses_3500_tokens", values_us, "us"))


def in_turns(runs: dict[str, Run]) -> dict[str, list[float]]:
    """Run everything once a round, each round starting with another; the first round warms up."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_idx in range(ROUNDS + 1):
        first = round_idx % len(names)
        for name in names[first:] + names[:first]:
            value_s = runs[name]()
            if round_idx > 0:
                seconds[name].append(value_s)
    return seconds


def timed_s(work: Callable[[], object]) -> float:
    """Return how long one call takes, in seconds."""
    begun_s = time.perf_counter()
    work()
    return time.perf_counter() - begun_s


def copied_s(source: NDArray[np.uint8], target: NDArray[np.uint8], num_threads: int) -> float:
    """Return the seconds of a memcpy of ``WORKING_BYTES``, one piece per thread.

    From the first start to the last end as the threads see them: the peer is not charged for
    starting them.
    """
    piece_bytes = WORKING_BYTES // num_threads
    begun_s, ended_s = [0.0] * num_threads, [0.0] * num_threads
    together = threading.Barrier(num_threads)

    def copy_piece(thread_idx: int) -> None:
        offset = BLOCKS_BYTES + thread_idx * piece_bytes
        together.wait()
        begun_s[thread_idx] = time.perf_counter()
        ctypes.memmove(target.ctypes.data + offset, source.ctypes.data + offset, piece_bytes)
        ended_s[thread_idx] = time.perf_counter()

    others = [threading.Thread(target=copy_piece, args=(idx,)) for idx in range(1, num_threads)]
    for thread in others:
        thread.start()
    copy_piece(0)
    for thread in others:
        thread.join()
    return max(ended_s) - min(begun_s)


if __name__ == "__main__":
    sys.exit(main())
