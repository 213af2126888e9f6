"""Mooncake Store through kvkeep's tier, against Mooncake's own client in a bare loop.

Both talk to one master and one storage process on loopback, from and to a shared file that they
know beforehand, in the same batches. They take turns batch by batch, so that both see the same
machine; a round's speed is that of all its batches. The tier's values are read back and compared
before anything is measured.
"""

import contextlib
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.figures import Figure, median_figure
from benchmarks.tiers.networked import BATCHES, MIB, TARGET, VALUE_BYTES
from kvkeep.model.ids import BlockHash, BlockKey, Namespace
from kvkeep.tiers.mooncake.settings import MooncakeSettings
from kvkeep.tiers.mooncake.tier import MooncakeTier
from tests.servers.mooncake import mooncake_store

ROUND_BYTES = 64 * MIB
ROUNDS = 15
SEGMENT_BYTES = 512 * MIB
START_TIMEOUT_S = 60.0

Move = Callable[[range, int], None]
"""Moves the values with these numbers, each of so many bytes, from or to their places."""


@dataclass(frozen=True)
class Subject:
    """One way to write and to read."""

    write: Move
    read: Move
    delete: Move


def figures(rounds: int = ROUNDS) -> Iterator[Figure]:
    """Yield megabytes per second of the tier and of the bare client, by value size and batch."""
    with mooncake_store(1, SEGMENT_BYTES) as store, _shared_memory(ROUND_BYTES) as memory:
        memory[:] = np.random.default_rng(1).bytes(ROUND_BYTES)
        with _our_tier(store.address, memory) as ours, _bare_client(store.address, memory) as bare:
            for value_bytes in VALUE_BYTES:
                _check(ours, memory, value_bytes)
                for batch in BATCHES:
                    yield from _measured((ours, bare), value_bytes, batch, rounds)


def _measured(
    subjects: tuple[Subject, Subject], value_bytes: int, batch: int, rounds: int
) -> Iterator[Figure]:
    num_values = ROUND_BYTES // value_bytes
    speeds: dict[str, tuple[list[float], list[float]]] = {"write": ([], []), "read": ([], [])}
    for number in range(rounds + 1):
        for what, sides in speeds.items():
            moves = [getattr(subject, what) for subject in subjects]
            took_s = _in_turns(moves, num_values, value_bytes, batch)
            if number:  # the first round touches memory and opens connections
                for side, side_s in zip(sides, took_s, strict=True):
                    side.append(ROUND_BYTES / side_s / 1e6)
        for subject in subjects:
            subject.delete(range(num_values), value_bytes)
    for what, (values, peer_values) in speeds.items():
        yield median_figure(
            f"tiers.mooncake.{what}.{value_bytes // MIB}mib.batch_{batch}",
            values,
            "MB/s",
            peer_values=peer_values,
            peer_name="Mooncake's client in a bare loop",
            target=TARGET,
        )


def _in_turns(moves: list[Move], num_values: int, value_bytes: int, batch: int) -> list[float]:
    """Return the seconds that each took for all values."""
    took_s = [0.0] * len(moves)
    for turn, first in enumerate(range(0, num_values, batch)):
        numbers = range(first, min(first + batch, num_values))
        sides = list(enumerate(moves))
        for side, move in sides if turn % 2 else reversed(sides):
            begun_s = time.perf_counter()
            move(numbers, value_bytes)
            took_s[side] += time.perf_counter() - begun_s
    return took_s


def _check(ours: Subject, memory: memoryview, value_bytes: int) -> None:
    before = bytes(memory)
    numbers = range(ROUND_BYTES // value_bytes)
    ours.write(numbers, value_bytes)
    memory[:] = bytes(ROUND_BYTES)
    ours.read(numbers, value_bytes)
    ours.delete(numbers, value_bytes)
    if memory != before:
        raise RuntimeError("the tier returned other bytes than were written")


@contextlib.contextmanager
def _our_tier(master: str, memory: memoryview) -> Iterator[Subject]:
    tier = MooncakeTier(MooncakeSettings(master=master, timeout_s=10.0))

    def keys(numbers: range) -> list[BlockKey]:
        return [
            BlockKey(Namespace(bytes(32)), BlockHash(number.to_bytes(32, "big")))
            for number in numbers
        ]

    def write(numbers: range, value_bytes: int) -> None:
        values = [[_place(memory, number, value_bytes)] for number in numbers]
        if not all(tier.write(keys(numbers), values)):
            raise RuntimeError("the tier declined a value")

    def read(numbers: range, value_bytes: int) -> None:
        rooms = [[_place(memory, number, value_bytes)] for number in numbers]
        if tier.read(keys(numbers), rooms) != [value_bytes] * len(numbers):
            raise RuntimeError("the tier lost a value")

    try:
        if not tier.wait_ready(START_TIMEOUT_S):
            raise RuntimeError("the tier did not become ready")
        tier.register(memory)
        yield Subject(write, read, lambda numbers, _: tier.delete(keys(numbers)))
    finally:
        tier.close()


def _place(memory: memoryview, number: int, value_bytes: int) -> memoryview:
    return memory[number * value_bytes : (number + 1) * value_bytes]


@contextlib.contextmanager
def _bare_client(master: str, memory: memoryview) -> Iterator[Subject]:
    os.environ.setdefault("MC_TCP_BIND_ADDRESS", "127.0.0.1")
    os.environ.setdefault("GLOG_minloglevel", "3")
    from mooncake.store import MooncakeDistributedStore

    store: Any = MooncakeDistributedStore()
    if code := store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 * MIB, "tcp", "", master):
        raise RuntimeError(f"Mooncake's client could not be set up: code {code}")
    base = int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)
    store.register_buffer(base, memory.nbytes)

    def names(numbers: range) -> list[str]:
        return [f"bare/{number}" for number in numbers]

    def move(call: Any, right: int, numbers: range, value_bytes: int) -> None:
        places = [base + number * value_bytes for number in numbers]
        codes = call(names(numbers), places, [value_bytes] * len(numbers))
        if codes != [right] * len(numbers):
            raise RuntimeError("the bare client's value was declined or lost")

    try:
        yield Subject(
            write=lambda numbers, size: move(store.batch_put_from, 0, numbers, size),
            read=lambda numbers, size: move(store.batch_get_into, size, numbers, size),
            delete=lambda numbers, _: store.batch_remove(names(numbers), True),
        )
    finally:
        store.close()


@contextlib.contextmanager
def _shared_memory(num_bytes: int) -> Iterator[memoryview]:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(num_bytes)
        memory = mmap.mmap(file.fileno(), num_bytes)
    # Not closed: views of it live until the end of the process.
    yield memoryview(memory)
