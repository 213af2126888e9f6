"""What control costs: lookup and lease of a long prompt, hashing it, and the bookkeeping of a load.

A daemon process of its own serves a pool of small head pages, so that a long prompt's blocks fit on
any machine; control does not touch payloads, so their size changes nothing. A second process plays
the worker of a busy engine: it reserves and commits batches of blocks that are new each time, first
at the rate of a busy engine on a CPU, then as fast as it is answered.

    python -m benchmarks.control
"""

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.figures import Target, emit, median_figure
from kvkeep.client.connection import Connection
from kvkeep.client.link import Link
from kvkeep.client.prefixes import Answer, PrefixClient, PrefixLease
from kvkeep.core.effects import NO_SLOT
from kvkeep.model.clock import SystemClock
from kvkeep.model.hashing import BlockHasher
from kvkeep.model.ids import BlockHash, Namespace
from kvkeep.protocol import messages as m
from kvkeep.protocol.codec import join_hashes, split_slots
from kvkeep.protocol.versions import VERSION
from kvkeep.tiers.shared_memory import PoolView
from kvkeep.transfer.host_copy import addresses

NAMESPACE: Final = Namespace(b"n" * 32)
NUM_BLOCKS: Final = 625
"""10,000 tokens in blocks of 16."""
NUM_TOKENS: Final = 10_000
ROUNDS: Final = 7
QUESTIONS: Final = 600
"""Per round and figure."""
BATCH_BLOCKS: Final = 64
"""As the connector stores."""
BUSY_BLOCKS_PER_S: Final = 400
"""What SmolLM2 fills while it prefills on two CPU cores, several times over."""
POOL_BYTES: Final = 96 << 20
ACQUIRE_MS_P50: Final = 0.3
ACQUIRE_MS_P99: Final = 1.0
LOAD_CONTROL_MS: Final = 1.0
CALL_TIMEOUT_S: Final = 5.0
LEASE_S: Final = 60.0
GROWN_BYTES: Final = 31 << 20
"""Just below the largest size that glibc learns from."""


@dataclass(frozen=True)
class Shape:
    """A model's blocks, with pages too small for any KV."""

    name: str
    layout: m.Layout
    num_blocks: int


SHAPES: Final = (
    Shape("smollm2", m.Layout(30, 3, 64, 32, "bfloat16", "bench"), NUM_BLOCKS),
    Shape("8b", m.Layout(32, 8, 64, 16, "bfloat16", "bench"), NUM_BLOCKS),
)


def main() -> int:
    """Measure and print; 0 whether or not targets are met."""
    measure_hashing()
    for shape in SHAPES:
        with running_daemon() as socket, Worker(socket, shape.layout) as worker:
            hashes = chain(0, shape.num_blocks)
            worker.store(hashes)
            measure_acquire(shape, socket, hashes)
            measure_load(shape, socket, hashes, worker)
    return 0


# --- the other side -------------------------------------------------------------------------------


@contextlib.contextmanager
def running_daemon() -> Iterator[str]:
    """Run a daemon process; yields its socket."""
    with tempfile.TemporaryDirectory(prefix="kvkeep-bench-") as folder:
        socket, pool = f"{folder}/d.sock", Path(f"/dev/shm/kvkeep-bench-{os.getpid()}.pool")
        command = [sys.executable, "-c", "from kvkeep.cli.daemon import daemon; daemon()"]
        command += ["--socket", socket, "--pool", str(pool), "--pool-bytes", str(POOL_BYTES)]
        command += ["--log-level", "WARNING"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["event"] == "ready"
            yield socket
        finally:
            end(process)
            pool.unlink(missing_ok=True)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Stop a process that this one started, and wait for it."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


class Worker:
    """A worker's session: reserves and commits blocks without copying any."""

    def __init__(self, socket: str, layout: m.Layout) -> None:
        self.connection = Connection.open(
            socket, m.Hello(VERSION, "worker", f"bench-{os.getpid()}", layout), CALL_TIMEOUT_S
        )
        self.num_heads = layout.num_heads

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def store(self, hashes: Sequence[BlockHash]) -> int:
        """Store blocks in batches; returns how many became readable."""
        return sum(
            self.store_batch(hashes[start : start + BATCH_BLOCKS])
            for start in range(0, len(hashes), BATCH_BLOCKS)
        )

    def store_batch(self, hashes: Sequence[BlockHash]) -> int:
        """Reserve and commit one batch."""
        call, next_id = self.connection.call, self.connection.next_request_id
        reserve = m.Reserve(
            next_id(), NAMESPACE, 0, join_hashes(hashes), 0, self.num_heads, LEASE_S
        )
        reserved = call(reserve, m.Reserved, CALL_TIMEOUT_S)
        num_granted = sum(slot != NO_SLOT for slot in split_slots(reserved.slots))
        commit = m.Commit(next_id(), reserved.lease_id, b"\1" * num_granted)
        return call(commit, m.Committed, CALL_TIMEOUT_S).num_ready


def store_without_end(socket: str, layout: m.Layout, blocks_per_s: float) -> None:
    """Be a busy engine's worker until the process is ended; 0 blocks per second means no limit."""
    chance = random.Random(os.getpid())
    with Worker(socket, layout) as worker:
        due_s = time.perf_counter()
        while True:
            hashes = [BlockHash(chance.randbytes(32)) for _ in range(BATCH_BLOCKS)]
            worker.store_batch(hashes)
            if blocks_per_s:
                due_s += BATCH_BLOCKS / blocks_per_s
                time.sleep(max(0.0, due_s - time.perf_counter()))


@contextlib.contextmanager
def busy_engine(socket: str, shape: Shape, blocks_per_s: float | None) -> Iterator[None]:
    """Run a storing process meanwhile; None for nobody."""
    if blocks_per_s is None:
        yield
        return
    arguments = [shape.name, socket, str(blocks_per_s)]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.control", *arguments])
    try:
        time.sleep(1.0)  # until it has started
        yield
    finally:
        process.kill()
        process.wait()


# --- what is measured -----------------------------------------------------------------------------


def chain(seed: int, num_blocks: int) -> list[BlockHash]:
    """Hashes of a sequence of random tokens."""
    chance = random.Random(seed)
    token_ids = [chance.randrange(49152) for _ in range(num_blocks)]
    return list(BlockHasher(NAMESPACE, 1).extend(token_ids))


def measure_hashing() -> None:
    """Emit the time to hash a prompt of 10,000 tokens."""
    chance = random.Random(0)
    token_ids = [chance.randrange(49152) for _ in range(NUM_TOKENS)]
    for block_tokens in (16, 32):
        values_ms = [
            timed_ms(lambda: BlockHasher(NAMESPACE, block_tokens).extend(token_ids))  # noqa: B023
            for _ in range(ROUNDS * 10)
        ]
        emit(median_figure(f"control.hash_10000_tokens.block_{block_tokens}", values_ms, "ms"))


def measure_acquire(shape: Shape, socket: str, hashes: Sequence[BlockHash]) -> None:
    """Emit lookup and lease as the scheduler sees them, under three loads of the daemon."""
    for load, blocks_per_s in (("idle", None), ("busy", BUSY_BLOCKS_PER_S), ("saturated", 0.0)):
        with opened_client(socket) as client:
            kept = acquire(client, hashes)  # so that nobody's stores drive the blocks out
            with busy_engine(socket, shape, blocks_per_s):
                rounds = [sample_acquire(client, hashes) for _ in range(ROUNDS)]
            client.release([kept])
        name = f"control.acquire_{len(hashes)}.{shape.name}.{load}"
        is_target = load == "busy"
        for part, bound in (("p50", ACQUIRE_MS_P50), ("p99", ACQUIRE_MS_P99)):
            at = {"p50": 0.50, "p99": 0.99}[part]
            values_ms = [quantile(values, at) for values in rounds]
            target = Target("value", "<=", bound) if is_target else None
            emit(median_figure(f"{name}.{part}", values_ms, "ms", target=target))


@contextlib.contextmanager
def opened_client(socket: str) -> Iterator[PrefixClient]:
    """A scheduler's client of the daemon."""
    link = Link(socket, lambda: m.Hello(VERSION, "scheduler", "bench"))
    assert link.wait(CALL_TIMEOUT_S) is not None
    client = PrefixClient(link, SystemClock(), lease_s=LEASE_S, patience_s=CALL_TIMEOUT_S)
    try:
        yield client
    finally:
        client.close()


def acquire(client: PrefixClient, hashes: Sequence[BlockHash]) -> PrefixLease:
    """Ask, wait for the answer, and check that it is the whole prefix."""
    question = client.ask(NAMESPACE, 0, hashes)
    assert question is not None
    lease = client.answer(question, CALL_TIMEOUT_S)
    assert not isinstance(lease, Answer)
    assert len(lease.slots) == len(hashes)
    return lease


def sample_acquire(client: PrefixClient, hashes: Sequence[BlockHash]) -> list[float]:
    """Milliseconds of each acquire; requests come at random moments, as requests do."""
    chance = random.Random(1)
    values_ms = []
    for _ in range(QUESTIONS):
        time.sleep(chance.uniform(0, 0.004))
        begun_s = time.perf_counter()
        lease = acquire(client, hashes)
        values_ms.append((time.perf_counter() - begun_s) * 1e3)
        client.release([lease])
    return values_ms


def measure_load(shape: Shape, socket: str, hashes: Sequence[BlockHash], worker: Worker) -> None:
    """Emit all that a load costs besides moving bytes: lease, headers, digests, addresses."""
    welcome = worker.connection.welcome
    assert welcome is not None
    view = PoolView.open(welcome.pool_path, welcome.pool_id)
    layout = shape.layout
    bases = np.arange(layout.num_layers, dtype=np.uint64) << np.uint64(30)
    block_ids = random.Random(2).sample(range(4096), len(hashes))

    def control(client: PrefixClient) -> None:
        lease = acquire(client, hashes)
        slots = np.asarray(lease.slots, dtype=np.int64)
        digests = np.ascontiguousarray(view.digests[slots, :, 0 : layout.num_heads])
        assert view.readable(slots, NAMESPACE, 0, hashes).all()
        source = view.page_addresses(slots, 0, layout.num_heads).reshape(-1)
        target = addresses(
            bases,
            block_stride_bytes=layout.num_heads * layout.page_bytes,
            head_stride_bytes=layout.page_bytes,
            block_ids=block_ids,
            head_range=range(layout.num_heads),
        ).reshape(-1)
        assert len(source) == len(target) == digests.size // 16
        client.release([lease])

    name = f"control.load_{len(hashes)}.{shape.name}"
    target = Target("value", "<=", LOAD_CONTROL_MS)
    with opened_client(socket) as client:
        emit(median_figure(name, sample_load(lambda: control(client)), "ms", target=target))


def sample_load(control: Callable[[], None]) -> list[float]:
    """The median of each round, in milliseconds.

    glibc gives memory back to the kernel, and takes page faults for it again, until a process has
    once freed a larger piece (mallopt(3), M_MMAP_THRESHOLD). A worker has, when it loaded its
    weights; here an array does it. Without, these figures are two to three times as large.
    """
    np.ones(GROWN_BYTES, dtype=np.uint8)
    control()
    return [statistics.median(timed_ms(control) for _ in range(100)) for _ in range(ROUNDS)]


def timed_ms(work: Callable[[], object]) -> float:
    """How long one call takes, in milliseconds."""
    begun_s = time.perf_counter()
    work()
    return (time.perf_counter() - begun_s) * 1e3


def quantile(values: Sequence[float], share: float) -> float:
    """The value that this share of the others stays below."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


if __name__ == "__main__":
    if len(sys.argv) == 4:
        chosen = next(shape for shape in SHAPES if shape.name == sys.argv[1])
        store_without_end(sys.argv[2], chosen.layout, float(sys.argv[3]))
    sys.exit(main())
