"""The disk tier against fio on the same file system, in turns.

fio reads and writes a file of its own in pieces of a value: with as many threads as the tier has,
each in a part of the file, and with as many pieces in flight from one thread; the faster is the
peer. It goes around the page cache if the tier does, and neither asks for a flush. The tier reads
into and writes from a file in shared memory, as the pool is one, and makes and proves a digest of
every value.
"""

import contextlib
import json
import mmap
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.figures import Figure, Target, median_figure
from kvkeep.model.errors import InputError
from kvkeep.model.ids import BlockHash, BlockKey, Namespace
from kvkeep.tiers.disk.entries import Entry, Geometry
from kvkeep.tiers.disk.headers import HeaderFile
from kvkeep.tiers.disk.segments import Segments
from kvkeep.tiers.disk.tier import DiskOptions, DiskTier

MIB = 1 << 20
VALUE_BYTES = 4 * MIB
NUM_VALUES = 256
BATCH = 32
ROUNDS = 9
NUM_ENTRIES = 200_000
SHARE_OF_FIO_MIN = 0.85
NUM_THREADS = DiskOptions().num_threads


def figures(rounds: int = ROUNDS) -> Iterator[Figure]:
    """Yield megabytes per second of reads and writes beside fio's, and headers per second at start.

    Raises:
        InputError: fio is not there.
    """
    if shutil.which("fio") is None:
        raise InputError("fio is not installed: install Debian's package fio")
    with tempfile.TemporaryDirectory(prefix="kvkeep-bench-") as name:
        yield from _moves(Path(name), rounds)
        yield from _starts(Path(name), rounds)


# --- Reads and writes ----------------------------------------------------------------------------


def _moves(folder: Path, rounds: int) -> Iterator[Figure]:
    with _shared_memory(BATCH * VALUE_BYTES) as pool:
        pool[:] = np.random.default_rng(1).bytes(len(pool))
        tier = DiskTier(folder / "tier", (NUM_VALUES + 1) * (VALUE_BYTES + 4096), VALUE_BYTES)
        with contextlib.closing(tier):
            _check(tier, pool)
            threads = _Fio(folder / "fio.bin", tier.is_direct, "psync", NUM_THREADS, 1)
            queue = _Fio(folder / "fio.bin", tier.is_direct, "libaio", 1, NUM_THREADS)
            subjects: dict[str, Callable[[], float]] = {
                "write": lambda: _write_all(tier, pool),
                "threads_write": lambda: threads.run("write"),
                "queue_write": lambda: queue.run("write"),
                "read": lambda: _read_all(tier, pool, folder),
                "threads_read": lambda: threads.run("read"),
                "queue_read": lambda: queue.run("read"),
            }
            speeds = _in_turns(subjects, rounds)
            how = "direct" if tier.is_direct else "buffered"
            for what in ("read", "write"):
                peer = max(
                    ("threads", "queue"), key=lambda way: statistics.median(speeds[f"{way}_{what}"])
                )
                yield median_figure(
                    f"tiers.disk.{what}.4mib",
                    speeds[what],
                    "MB/s",
                    peer_values=speeds[f"{peer}_{what}"],
                    peer_name=f"fio, {how}, {NUM_THREADS} {peer} (the faster of two ways)",
                    target=Target("ratio", ">=", SHARE_OF_FIO_MIN),
                )


def _in_turns(subjects: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Megabytes per second of each, every round in another order; the first round warms up."""
    names = list(subjects)
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names if number % 2 else reversed(names):
            speed = subjects[name]()
            if number:
                speeds[name].append(speed)
    return speeds


def _key(number: int) -> BlockKey:
    return BlockKey(Namespace(bytes(32)), BlockHash(number.to_bytes(32, "big")))


def _batches() -> Iterator[list[BlockKey]]:
    for first in range(0, NUM_VALUES, BATCH):
        yield [_key(number) for number in range(first, first + BATCH)]


def _places(pool: memoryview) -> list[list[memoryview]]:
    return [[pool[start : start + VALUE_BYTES]] for start in range(0, len(pool), VALUE_BYTES)]


def _write_all(tier: DiskTier, pool: memoryview) -> float:
    """Write every value anew; megabytes per second."""
    tier.delete([key for keys in _batches() for key in keys])
    begun_s = time.perf_counter()
    for keys in _batches():
        if tier.write(keys, _places(pool)) != [True] * BATCH:
            raise RuntimeError("the tier declined a value")
    return NUM_VALUES * VALUE_BYTES / (time.perf_counter() - begun_s) / 1e6


def _read_all(tier: DiskTier, pool: memoryview, folder: Path) -> float:
    """Read every value; megabytes per second."""
    if not tier.is_direct:
        _forget_pages(folder / "tier")
    begun_s = time.perf_counter()
    for keys in _batches():
        if tier.read(keys, _places(pool)) != [VALUE_BYTES] * BATCH:
            raise RuntimeError("the tier lost a value")
    return NUM_VALUES * VALUE_BYTES / (time.perf_counter() - begun_s) / 1e6


def _check(tier: DiskTier, pool: memoryview) -> None:
    """Prove that the bytes are right before anything is measured."""
    before = bytes(pool)
    _write_all(tier, pool)
    for keys in _batches():
        pool[:] = bytes(len(pool))
        if tier.read(keys, _places(pool)) != [VALUE_BYTES] * BATCH or pool != before:
            raise RuntimeError("the tier returned other bytes than were written")


class _Fio:
    """fio on a file as large as all values together."""

    def __init__(
        self, path: Path, is_direct: bool, ioengine: str, numjobs: int, iodepth: int
    ) -> None:
        """Use fio's own words for how many pieces move at once."""
        share = NUM_VALUES * VALUE_BYTES // numjobs
        options = {
            "name": "peer",
            "filename": path,
            "bs": VALUE_BYTES,
            "ioengine": ioengine,
            "iodepth": iodepth,
            "direct": int(is_direct),
            "numjobs": numjobs,
            "size": share,
            "offset_increment": share,
            # Twice, so that its own start and end weigh little.
            "loops": 2,
            "output-format": "json",
        }
        self._command = ["fio", "--thread", "--group_reporting"]
        self._command += [f"--{name}={value}" for name, value in options.items()]

    def run(self, what: str) -> float:
        """Read or write the whole file twice; megabytes per second, without fio's own start."""
        done = subprocess.run(
            [*self._command, f"--rw={what}"], check=True, capture_output=True, text=True
        )
        return float(json.loads(done.stdout)["jobs"][0][what]["bw_bytes"]) / 1e6


# --- Starts --------------------------------------------------------------------------------------


def _starts(folder: Path, rounds: int) -> Iterator[Figure]:
    """How fast headers become an index: of a tier full of the smallest values."""
    folder /= "starts"
    folder.mkdir()
    geometry = Geometry.fit(NUM_ENTRIES * 8192, 4096, 256 * MIB)
    headers = HeaderFile(folder)
    headers.prepare(geometry, NUM_ENTRIES)
    segments = Segments(folder, geometry, NUM_ENTRIES, is_direct=False, num_moves=1)
    while segments.grow():
        pass
    segments.close()
    for slot in range(NUM_ENTRIES):
        headers.write(slot, Entry(_key(slot), 4096, bytes(16), slot))
    headers.close()
    rates = []
    for _ in range(rounds):
        _forget_pages(folder)
        begun_s = time.perf_counter()
        tier = DiskTier(folder, NUM_ENTRIES * 8192, 4096)
        rates.append(NUM_ENTRIES / (time.perf_counter() - begun_s))
        num_values = tier.use().num_values
        tier.close()
        if num_values != NUM_ENTRIES:
            raise RuntimeError("the tier lost entries")
    yield median_figure("tiers.disk.open", rates, "entries/s")


def _forget_pages(folder: Path) -> None:
    """Empty the page cache of a folder's files."""
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDWR)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


@contextlib.contextmanager
def _shared_memory(num_bytes: int) -> Iterator[memoryview]:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(num_bytes)
        memory = mmap.mmap(file.fileno(), num_bytes)
    # Not closed: views of it live until the end of the process.
    yield memoryview(memory)
