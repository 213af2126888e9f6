"""A small disk tier for tests; as a program, one that is written to until it is killed.

    python -m tests.fault.disk_tiers FOLDER

Three threads write values, and each that is kept is said on standard output.
"""

import itertools
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from kvkeep.model.clock import Clock
from kvkeep.testing.tier_contract import block_key, read, value_bytes, write
from kvkeep.tiers.disk.tier import DiskOptions, DiskTier

VALUE_BYTES = 100_000
SLOT_BYTES = 106_496
SEGMENT_SLOTS = 4
OPTIONS = DiskOptions(segment_bytes=SEGMENT_SLOTS * SLOT_BYTES)
NUM_THREADS = 3


def new_tier(folder: Path, num_slots: int = 8, clock: Clock | None = None) -> DiskTier:
    """A tier on a folder, with small segments."""
    return DiskTier(folder, num_slots * SLOT_BYTES, VALUE_BYTES, options=OPTIONS, clock=clock)


def found(tier: DiskTier, numbers: Sequence[int]) -> list[int]:
    """Which of these values are there; a wrong byte fails the test."""
    values = read(tier, [block_key(number) for number in numbers], VALUE_BYTES)
    for number, value in zip(numbers, values, strict=True):
        assert value in (None, value_bytes(number, VALUE_BYTES))
    return [number for number, value in zip(numbers, values, strict=True) if value is not None]


def main(folder: str) -> None:
    """Write; see the module."""
    tier = new_tier(Path(folder), 4000)
    numbers = itertools.count()

    def work() -> None:
        for number in numbers:
            if write(tier, [number], VALUE_BYTES) == [True]:
                # In one call, so that a line is there whole or not at all.
                os.write(1, f"{number}\n".encode())

    for _ in range(NUM_THREADS):
        threading.Thread(target=work).start()


if __name__ == "__main__":
    main(sys.argv[1])
