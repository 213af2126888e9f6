"""Real daemons, and clients that do with them what an engine's connector does.

Blocks are small and their bytes follow from their hash, so that a test can tell at any time what a
block must hold.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvkeep.client.connection import Connection
from kvkeep.client.link import Link
from kvkeep.client.prefixes import Answer, PrefixClient, PrefixLease
from kvkeep.core.effects import NO_SLOT
from kvkeep.model.clock import SystemClock
from kvkeep.model.ids import BlockHash, Namespace
from kvkeep.model.layout import KvLayout
from kvkeep.protocol import messages as m
from kvkeep.protocol.codec import join_hashes, split_slots
from kvkeep.protocol.versions import VERSION
from kvkeep.tiers.pool_inode import FILE_HEADER_BYTES
from kvkeep.tiers.shared_memory import PoolView
from kvkeep.tiers.slot_header import DIGEST_BYTES, HEADER_BYTES
from kvkeep.transfer.host_copy import open_copier
from tests.waiting import HANG_S

LAYOUT = KvLayout(4, 2, 1024, 16, "bfloat16", "test")
NAMESPACE = Namespace(b"n" * 32)
POOL_BYTES = 16 << 20
START_TIMEOUT_S = 120.0
CALL_TIMEOUT_S = HANG_S
BATCH_BLOCKS = 64
COMMAND = (sys.executable, "-m", "kvkeep", "daemon")

Bytes = npt.NDArray[np.uint8]


def wait_until(is_so: Callable[[], bool], what: str, timeout_s: float = HANG_S) -> float:
    """Look again and again until it is so; returns how long that took in seconds."""
    begun_s = time.perf_counter()
    pause = threading.Event()
    while not is_so():
        assert time.perf_counter() - begun_s < timeout_s, f"not within {timeout_s} s: {what}"
        pause.wait(0.01)
    return time.perf_counter() - begun_s


def hash_of(number: int) -> BlockHash:
    """A block hash that no other number has."""
    return BlockHash(number.to_bytes(8, "little") * 4)


def hashes_of(first: int, num_blocks: int) -> list[BlockHash]:
    """Hashes of a sequence of blocks."""
    return [hash_of(number) for number in range(first, first + num_blocks)]


def payload_of(block_hash: BlockHash, layout: KvLayout = LAYOUT) -> Bytes:
    """What a block holds: uint8 ``[block_bytes]``, different in every page."""
    seed = int.from_bytes(block_hash[:8], "little")
    return np.random.default_rng(seed).integers(0, 256, layout.block_bytes, dtype=np.uint8)


class Daemon:
    """A daemon process in a folder of its own, which may die and be started again."""

    def __init__(self, command: Sequence[str] = COMMAND, **settings: object) -> None:
        self._command = command
        # The pid tells other test runs on this machine whose pool it is.
        self.folder = Path(tempfile.mkdtemp(prefix=f"kvkeep-{os.getpid()}-"))
        self.socket = str(self.folder / "d.sock")
        self.pool = Path(f"/dev/shm/{self.folder.name}.pool")
        self.settings = {"pool_bytes": POOL_BYTES, "pool": self.pool, "socket": self.socket}
        self.settings |= settings
        self.process: subprocess.Popen[bytes] | None = None
        self.ready: dict[str, Any] = {}

    @property
    def pid(self) -> int:
        """Of the daemon that runs."""
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        """Start, and wait until it says that it is ready."""
        self.process = spawn(self.settings, self.folder / "log", self._command)
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], START_TIMEOUT_S)
        line = self.process.stdout.readline() if readable else b""
        assert line, f"the daemon did not start: {(self.folder / 'log').read_text()}"
        self.ready = json.loads(line)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the daemon alone."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it without warning."""
        if self.process is not None:
            self.process.kill()
            self._reap()

    def stop(self) -> int:
        """End it politely; returns its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        return self._reap()

    def _reap(self) -> int:
        assert self.process is not None
        assert self.process.stdout is not None
        code = self.process.wait(HANG_S)
        self.process.stdout.close()
        self.process = None
        return code

    def get(self, path: str) -> bytes:
        """An HTTP answer's body."""
        url = f"http://127.0.0.1:{self.ready['metrics_port']}{path}"
        with urllib.request.urlopen(url, timeout=CALL_TIMEOUT_S) as answer:
            body: bytes = answer.read()
            return body

    def status(self) -> dict[str, Any]:
        """``GET /status``."""
        found: dict[str, Any] = json.loads(self.get("/status"))
        return found

    def counter(self, name: str) -> int:
        """One counter."""
        return int(self.status()["counters"][name])

    def gauge(self, name: str) -> int:
        """One gauge."""
        return int(self.status()["gauges"][name])

    def num_files(self) -> int:
        """Descriptors that the process holds."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def log(self) -> str:
        """What it wrote to stderr so far."""
        return (self.folder / "log").read_text()


def arguments(settings: Mapping[str, object]) -> list[str]:
    """Settings as flags."""
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag}={value}")
    return flags


def spawn(
    settings: Mapping[str, object], log: Path, command: Sequence[str] = COMMAND
) -> "subprocess.Popen[bytes]":
    """A daemon process that may not be ready yet; its stdout is a pipe."""
    with log.open("ab") as stderr:
        return subprocess.Popen(
            [*command, *arguments(settings)], stdout=subprocess.PIPE, stderr=stderr
        )


@contextlib.contextmanager
def running_daemon(command: Sequence[str] = COMMAND, **settings: object) -> Iterator[Daemon]:
    """A daemon that is ready; nothing of it is left afterwards."""
    daemon = Daemon(command, **settings)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.kill()
        daemon.pool.unlink(missing_ok=True)
        shutil.rmtree(daemon.folder, ignore_errors=True)


def hello(role: str = "tool", layout: KvLayout | None = None, engine_id: str = "test") -> m.Hello:
    """A greeting."""
    wire = None
    if layout is not None:
        wire = m.Layout(*(getattr(layout, name) for name in m.Layout.__struct_fields__))
    return m.Hello(VERSION, role, engine_id, wire)


def connect(daemon: Daemon, greeting: m.Hello | None = None) -> Connection:
    """A session."""
    return Connection.open(daemon.socket, greeting or hello(), CALL_TIMEOUT_S)


class Worker:
    """One rank with all heads: stores and loads as ``connector/worker`` does."""

    def __init__(
        self, daemon: Daemon, *, layout: KvLayout = LAYOUT, engine_id: str = "test"
    ) -> None:
        self.layout = layout
        self.connection = connect(daemon, hello("worker", layout, engine_id))
        welcome = self.connection.welcome
        assert welcome is not None
        self.generation = welcome.generation
        self.view = PoolView.open(welcome.pool_path, welcome.pool_id)
        self._copier = open_copier()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the session."""
        self.connection.close()

    def reserve(self, hashes: Sequence[BlockHash], lease_s: float = 30.0) -> m.Reserved:
        """Ask for slots for these blocks."""
        request = m.Reserve(
            self.connection.next_request_id(),
            NAMESPACE,
            0,
            join_hashes(hashes),
            0,
            self.layout.num_heads,
            lease_s,
        )
        return self.connection.call(request, m.Reserved, CALL_TIMEOUT_S)

    def copy(self, hashes: Sequence[BlockHash], slots: Sequence[int]) -> None:
        """Copy blocks and their digests into slots."""
        found = [(h, slot) for h, slot in zip(hashes, slots, strict=True) if slot != NO_SLOT]
        memory = np.concatenate([payload_of(h, self.layout) for h, _ in found])
        slot_array = np.array([slot for _, slot in found], dtype=np.int64)
        source = self._pages(memory)
        target = self.view.page_addresses(slot_array, 0, self.layout.num_heads).reshape(-1)
        digests = np.empty((len(source), DIGEST_BYTES), dtype=np.uint8)
        self._copier.store(source, target, self.layout.page_bytes, digests)
        self.view.digests[slot_array] = digests.reshape(
            len(found), self.layout.num_layers, self.layout.num_heads, DIGEST_BYTES
        )

    def commit(self, reserved: m.Reserved, *, is_stored: bool = True) -> m.Committed:
        """Say that the copies of a reservation are done."""
        num_granted = sum(slot != NO_SLOT for slot in split_slots(reserved.slots))
        request = m.Commit(
            self.connection.next_request_id(),
            reserved.lease_id,
            bytes([is_stored]) * num_granted,
        )
        return self.connection.call(request, m.Committed, CALL_TIMEOUT_S)

    def store(self, hashes: Sequence[BlockHash]) -> int:
        """Store blocks in batches; returns how many became readable."""
        num_ready = 0
        for start in range(0, len(hashes), BATCH_BLOCKS):
            batch = hashes[start : start + BATCH_BLOCKS]
            reserved = self.reserve(batch)
            if reserved.lease_id:
                self.copy(batch, split_slots(reserved.slots))
                num_ready += self.commit(reserved).num_ready
        return num_ready

    def load(
        self, hashes: Sequence[BlockHash], slots: Sequence[int]
    ) -> tuple[list[bool], list[Bytes]]:
        """Load blocks in the order of ``WorkerSide``: digests, headers, bytes.

        Returns:
            Which landed, and what lies in the engine's memory then, zeros where nothing landed.
        """
        nothing = [np.zeros(self.layout.block_bytes, dtype=np.uint8) for _ in slots]
        if not self.view.is_whole():
            return [False] * len(slots), nothing
        slot_array = np.array(slots, dtype=np.int64)
        digests = np.ascontiguousarray(self.view.digests[slot_array]).reshape(-1, DIGEST_BYTES)
        readable = self.view.readable(slot_array, NAMESPACE, 0, hashes)
        memory = np.zeros(len(slots) * self.layout.block_bytes, dtype=np.uint8)
        source = self.view.page_addresses(slot_array, 0, self.layout.num_heads).reshape(-1)
        ok = np.empty(len(source), dtype=np.bool_)
        self._copier.load(source, self._pages(memory), self.layout.page_bytes, digests, ok)
        landed = np.all(ok.reshape(len(slots), -1), axis=1) & readable
        blocks = memory.reshape(len(slots), -1)
        return [bool(flag) for flag in landed], [blocks[idx] for idx in range(len(slots))]

    def _pages(self, memory: Bytes) -> npt.NDArray[np.uint64]:
        starts = np.arange(0, memory.size, self.layout.page_bytes, dtype=np.uint64)
        return starts + np.uint64(memory.ctypes.data)


@contextlib.contextmanager
def opened_prefixes(
    daemon: Daemon, *, lease_s: float = 30.0, patience_s: float = 0.25
) -> Iterator[PrefixClient]:
    """A scheduler's client."""
    link = Link(daemon.socket, lambda: hello("scheduler"))
    client = PrefixClient(link, SystemClock(), lease_s=lease_s, patience_s=patience_s)
    try:
        assert link.wait(CALL_TIMEOUT_S) is not None, link.refusal
        yield client
    finally:
        client.close()


def acquire(
    client: PrefixClient, hashes: Sequence[BlockHash], wait_s: float = CALL_TIMEOUT_S
) -> PrefixLease | None:
    """A lease on the longest readable prefix; None if there is none, or nobody answers in time."""
    question = client.ask(NAMESPACE, 0, hashes)
    if question is None:
        return None
    answer = client.answer(question, wait_s)
    return None if isinstance(answer, Answer) else answer


def load_right_or_not_at_all(
    worker: Worker, client: PrefixClient, hashes: Sequence[BlockHash]
) -> int:
    """Acquire and load each block alone; returns how many landed, all of them with their bytes."""
    num_landed = 0
    for block_hash in hashes:
        lease = acquire(client, [block_hash])
        if lease is None:
            continue
        landed, found = worker.load([block_hash], lease.slots)
        client.release([lease])
        if landed[0]:
            assert np.array_equal(found[0], payload_of(block_hash, worker.layout))
            num_landed += 1
    return num_landed


class Vandal:
    """Changes bytes of a pool behind everybody's back."""

    def __init__(self, view: PoolView) -> None:
        self._bytes = view._bytes
        self._geometry = view.geometry
        self.digest_bytes = DIGEST_BYTES * view.geometry.layout.num_pages

    def header(self, slot: int) -> Bytes:
        """The header of a slot."""
        start = FILE_HEADER_BYTES + slot * self._geometry.header_stride
        return self._bytes[start : start + HEADER_BYTES]

    def digests(self, slot: int) -> Bytes:
        """The digests of a slot."""
        start = FILE_HEADER_BYTES + slot * self._geometry.header_stride + HEADER_BYTES
        return self._bytes[start : start + self.digest_bytes]

    def payload(self, slot: int) -> Bytes:
        """The bytes of a slot."""
        size = self._geometry.layout.block_bytes
        start = self._geometry.payload_offset + slot * size
        return self._bytes[start : start + size]

    @staticmethod
    def flip(part: Bytes, bit_idx: int) -> None:
        """Turn one bit over; twice is nothing."""
        part[bit_idx // 8] ^= np.uint8(1 << (bit_idx % 8))

    @staticmethod
    def swap(one: Bytes, other: Bytes) -> None:
        """Exchange two places."""
        before = one.copy()
        one[:] = other
        other[:] = before
