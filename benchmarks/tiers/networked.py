"""What the parts with a server and a client library have in common: two subjects, in turns."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.figures import Figure, Target, median_figure
from kvkeep.model.ids import BlockHash, BlockKey, Namespace
from kvkeep.tiers.base import Tier

MIB = 1 << 20
VALUE_BYTES = (1 * MIB, 4 * MIB)
BATCHES = (1, 8)
TARGET = Target("ratio", ">=", 0.85)

Move = Callable[[Sequence[int], Sequence[memoryview]], None]
"""Writes or reads a batch: values by number, and the memory of each."""


@dataclass(frozen=True)
class Subject:
    """One way to write and to read."""

    write: Move
    read: Move


def ours(tier: Tier) -> Subject:
    """Return the tier as a subject that fails when a value is declined or lost."""

    def write(numbers: Sequence[int], values: Sequence[memoryview]) -> None:
        if not all(tier.write([_key(number) for number in numbers], [[part] for part in values])):
            raise RuntimeError("the tier declined a value")

    def read(numbers: Sequence[int], rooms: Sequence[memoryview]) -> None:
        lengths = tier.read([_key(number) for number in numbers], [[room] for room in rooms])
        if lengths != [len(room) for room in rooms]:
            raise RuntimeError("the tier lost a value")

    return Subject(write, read)


def _key(number: int) -> BlockKey:
    return BlockKey(Namespace(bytes(32)), BlockHash(number.to_bytes(32, "big")))


def measured(
    figure: str,
    subjects: tuple[Subject, Subject],
    peer_name: str,
    *,
    round_bytes: int,
    rounds: int,
) -> Iterator[Figure]:
    """Yield megabytes per second of ours beside the peer's, by value size and batch.

    Args:
        figure: Beginning of the figures' names.
        subjects: Ours, and the bare client.
        peer_name: What the bare client does.
        round_bytes: Written, then read, in one round by each.
        rounds: How many, besides one that warms up.

    Raises:
        RuntimeError: Ours reads other bytes than were written.
    """
    memory = memoryview(bytearray(np.random.default_rng(1).bytes(round_bytes)))
    for value_bytes in VALUE_BYTES:
        values = [memory[at : at + value_bytes] for at in range(0, round_bytes, value_bytes)]
        _check(subjects[0], memory, values)
        for batch in BATCHES:
            speeds = _in_turns(subjects, values, batch, rounds)
            for what in ("write", "read"):
                yield median_figure(
                    f"{figure}.{what}.{value_bytes // MIB}mib.batch_{batch}",
                    speeds[what, 0],
                    "MB/s",
                    peer_values=speeds[what, 1],
                    peer_name=peer_name,
                    target=TARGET,
                )


def _check(subject: Subject, memory: memoryview, values: Sequence[memoryview]) -> None:
    before = bytes(memory)
    numbers = range(len(values))
    subject.write(numbers, values)
    memory[:] = bytes(len(memory))
    subject.read(numbers, values)
    if memory != before:
        raise RuntimeError("the tier returned other bytes than were written")


def _in_turns(
    subjects: Sequence[Subject], values: Sequence[memoryview], batch: int, rounds: int
) -> dict[tuple[str, int], list[float]]:
    """Take turns with every batch, so that what else the machine does strikes all alike."""
    speeds: dict[tuple[str, int], list[float]] = {
        (what, side): [] for what in ("write", "read") for side in range(len(subjects))
    }
    num_bytes = sum(len(value) for value in values)
    for number in range(rounds + 1):
        for what in ("write", "read"):
            moves = [getattr(subject, what) for subject in subjects]
            for side, took_s in enumerate(_taken_s(moves, values, batch)):
                if number:  # the first round touches memory and opens connections
                    speeds[what, side].append(num_bytes / took_s / 1e6)
    return speeds


def _taken_s(moves: Sequence[Move], values: Sequence[memoryview], batch: int) -> list[float]:
    """Seconds that each needed for all values; who is first changes with every batch."""
    taken_s = [0.0] * len(moves)
    for first in range(0, len(values), batch):
        group = values[first : first + batch]
        sides = range(len(moves))
        for side in sides if first // batch % 2 else reversed(sides):
            begun_s = time.perf_counter()
            moves[side](range(first, first + len(group)), group)
            taken_s[side] += time.perf_counter() - begun_s
    return taken_s
