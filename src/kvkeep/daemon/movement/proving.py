"""Before a tier serves: values are written to it and read back, byte by byte, and timed."""

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from enum import Enum

from kvkeep.model.errors import CorruptDataError, UnavailableError
from kvkeep.model.ids import CANARY_NAMESPACE, HASH_BYTES, BlockHash, BlockKey
from kvkeep.tiers.base import Tier

BATCH = 8
"""Values of the larger of the two batches: two sizes tell latency and bandwidth apart."""


Reads = Sequence[tuple[int, float]]
"""Bytes and seconds of reads that were measured."""


class Proof(Enum):
    """How far a tier has been proven."""

    DONE = "done"
    """It gave back what it was given."""
    DECLINED = "declined"
    """It answers and kept nothing: nothing speaks against what it has, which is checked anyway."""
    AWAITED = "awaited"
    """It has not answered yet: nothing is taken from it or given to it."""


class Canaries:
    """What one tier is proven with, each time the same: few can stay that can't be deleted.

    The bytes follow from the keys, so a write that was given up and arrives in the midst of the
    next proof changes nothing.
    """

    def __init__(self) -> None:
        self.keys = [
            BlockKey(CANARY_NAMESPACE, BlockHash(secrets.token_bytes(HASH_BYTES)))
            for _ in range(BATCH)
        ]
        self.are_left = False
        """Some may still be there, or come: set on any thread, and reset by who deletes them."""

    def values(self, value_bytes: int) -> list[bytes]:
        """One for each key, of this length."""
        return [hashlib.shake_128(key.block_hash).digest(value_bytes) for key in self.keys]


def prove_tier(
    tier: Tier,
    value_bytes: int,
    num_rejected: Callable[[], int] = lambda: 0,
    canaries: Canaries | None = None,
) -> list[tuple[int, float]]:
    """Write and read back what no engine wants.

    Args:
        tier: With all its wrappers.
        value_bytes: Length of the values that it is to keep.
        num_rejected: How many values its wrappers have not believed so far: what they reject is a
            miss to whoever reads, and here it is the proof that failed.
        canaries: What is written and read, and who is told if it may stay; others if None.

    Returns:
        Bytes and seconds of each read; fewer where the tier declined to keep a value.

    Raises:
        CorruptDataError: Other bytes came back; the tier must not be used.
        UnavailableError: The tier can't be used now.
    """
    canaries = canaries or Canaries()
    keys, values = canaries.keys, canaries.values(value_bytes)
    try:
        kept = tier.write(keys, [[memoryview(value)] for value in values])
    except UnavailableError:
        canaries.are_left = True  # they may arrive yet
        raise
    try:
        samples = []
        for count in (1, BATCH):
            if not all(kept[:count]):
                break
            before = num_rejected()
            seconds = _read_back(tier, keys[:count], values[:count])
            if seconds is None and num_rejected() > before:
                raise CorruptDataError(_gave_back_others(tier))
            if seconds is not None:
                samples.append((count * value_bytes, seconds))
        return samples
    finally:
        # What was found out counts, whether or not the values can be deleted.
        try:
            tier.delete(keys)
        except UnavailableError:
            canaries.are_left = True


def _read_back(tier: Tier, keys: Sequence[BlockKey], values: Sequence[bytes]) -> float | None:
    """Seconds that a read took; None if the tier has forgotten one of the values."""
    rooms = [bytearray(len(value)) for value in values]
    begun_s = time.perf_counter()
    lengths = tier.read(keys, [[memoryview(room)] for room in rooms])
    seconds = time.perf_counter() - begun_s
    for length, room, value in zip(lengths, rooms, values, strict=True):
        if length is not None and (length != len(value) or room != value):
            raise CorruptDataError(_gave_back_others(tier))
    return None if None in lengths else seconds


def _gave_back_others(tier: Tier) -> str:
    return f"the tier {tier.name} gave back other bytes than it was given"
