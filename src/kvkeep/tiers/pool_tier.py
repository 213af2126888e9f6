"""The primary tier behind the seam of the others: a pool file and its ledger in one process.

In a node the daemon owns the pool, and engines copy bytes under leases (``daemon/shell.py``). Here
one object does all of it, so that slots, leases, fences and digests keep the same contract as any
tier, and tools and tests can use a pool like one.

    slot:  | length of the value, 8 bytes | value | unused |
"""

import contextlib
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from kvkeep.core import effects as do
from kvkeep.core import events as on
from kvkeep.core.blocks import BlockState
from kvkeep.core.eviction.lru import LruPolicy
from kvkeep.core.node import NO_LEASE, NodeState
from kvkeep.model.ids import BlockKey, Holder
from kvkeep.model.layout import PAGE_BYTES_MAX, KvLayout
from kvkeep.tiers.base import Parts, TierUse, length_of
from kvkeep.tiers.memory import scatter
from kvkeep.tiers.shared_memory import PoolFile
from kvkeep.tiers.slot_header import SlotState

_LENGTH = struct.Struct("<Q")
_SELF = Holder(session_id=1, pid=1)
"""The only holder of leases; it never leaves."""
_NEVER_S = float("inf")
_HEADS = 1
"""Each value is written whole: one head, whose page is the slot (or a few, of large slots)."""


def pool_layout(value_bytes_max: int) -> KvLayout:
    """Slots for values of so many bytes and their length."""
    slot_bytes = _LENGTH.size + value_bytes_max
    num_pages = -(-slot_bytes // PAGE_BYTES_MAX)
    return KvLayout(num_pages, _HEADS, -(-slot_bytes // num_pages), 1, "uint8", "tier values 1")


class SharedMemoryTier:
    """Keeps values in slots of a pool file; the least recently used goes first. Thread-safe.

    The pool begins empty. A copy is made outside the lock, under a lease on its slot, as an engine
    makes it; what was overwritten or rotted meanwhile is found by its digests and is a miss.
    """

    def __init__(
        self, path: Path, pool_bytes: int, value_bytes_max: int, name: str = "shared_memory"
    ) -> None:
        """Create the pool, or replace one that nobody holds.

        Raises:
            RefusedError: A daemon holds it.
            InputError: The path can't be had, the memory is not there, or holds no two values.
            UnavailableError: The memory went while it was taken.
        """
        self.name = name
        self._value_bytes_max = value_bytes_max
        self._pool = PoolFile.open(path, pool_bytes)
        try:
            geometry = self._pool.format(pool_layout(value_bytes_max))
        except BaseException:
            self._pool.close()
            raise
        self._view = self._pool.view()
        self._node = NodeState(geometry.num_slots, _HEADS, LruPolicy())
        self._block_bytes = geometry.layout.block_bytes
        self._page_bytes = geometry.layout.page_bytes
        self._lock = threading.Lock()

    # ---- the ledger

    def _handle(self, event: on.Event) -> do.ReplyRead | do.ReplyStore | None:
        """Tell the ledger, write the headers it asks for, and return what it lends."""
        reply: do.ReplyRead | do.ReplyStore | None = None
        with self._lock:
            for effect in self._node.handle(event, now_s=0.0):
                match effect:
                    case do.ReplyRead() | do.ReplyStore():
                        reply = effect
                    case do.MarkWriting(slot, key, lease_id, pid):
                        self._pool.mark(slot, SlotState.WRITING, key, lease_id=lease_id, pid=pid)
                    case do.MarkReady(slot, key):
                        self._pool.mark(slot, SlotState.READY, key)
                    case do.MarkFree(slot):
                        self._pool.mark(slot, SlotState.FREE, None)
        return reply

    def _is_ready(self, key: BlockKey) -> bool:
        with self._lock:
            slot = self._node.ledger.find(key)
            return slot is not None and slot.state is BlockState.READY

    # ---- bytes

    def write(self, keys: Sequence[BlockKey], values: Sequence[Parts]) -> list[bool]:
        """Copy values into slots; declines what is too long, or finds every slot in use."""
        return [self._write_one(key, value) for key, value in zip(keys, values, strict=True)]

    def _write_one(self, key: BlockKey, value: Parts) -> bool:
        if length_of(value) > self._value_bytes_max:
            return False
        asked = on.StoreAsked(
            0, _SELF, key.namespace, key.group_idx, [key.block_hash], _HEADS, _NEVER_S
        )
        lent = self._handle(asked)
        if not isinstance(lent, do.ReplyStore) or lent.lease_id == NO_LEASE:
            # There already, or another thread is just writing it.
            return self._is_ready(key)
        is_stored = False
        try:
            self._fill(lent.slots[0], value)
            is_stored = True
        finally:
            self._handle(on.StoreFinished(0, _SELF, lent.lease_id, [is_stored]))
        return self._is_ready(key)

    def _fill(self, slot: int, value: Parts) -> None:
        target = self._view.payload(slot).data
        target[: _LENGTH.size] = _LENGTH.pack(length_of(value))
        start = _LENGTH.size
        for part in value:
            target[start : start + part.nbytes] = part
            start += part.nbytes
        for page, digest in enumerate(self._digests(target)):
            self._view.digests[slot, page, 0] = np.frombuffer(digest, dtype=np.uint8)

    def _digests(self, payload: memoryview) -> list[bytes]:
        starts = range(0, self._block_bytes, self._page_bytes)
        return [
            xxhash.xxh3_128_digest(payload[start : start + self._page_bytes]) for start in starts
        ]

    def read(self, keys: Sequence[BlockKey], into: Sequence[Parts]) -> list[int | None]:
        """Copy values out of slots, whose digests are compared."""
        return [self._read_one(key, room) for key, room in zip(keys, into, strict=True)]

    def _read_one(self, key: BlockKey, room: Parts) -> int | None:
        lent = self._handle(
            on.ReadAsked(0, _SELF, key.namespace, key.group_idx, [key.block_hash], _NEVER_S)
        )
        if not isinstance(lent, do.ReplyRead) or lent.lease_id == NO_LEASE:
            return None
        try:
            return self._copy_out(key, lent.slots[0], room)
        finally:
            self._handle(on.ReadFinished(_SELF, [lent.lease_id]))

    def _copy_out(self, key: BlockKey, slot: int, room: Parts) -> int | None:
        payload = self._view.payload(slot).data
        if not self._is_proven(key, slot, payload):
            self.delete([key])
            return None
        (length,) = _LENGTH.unpack_from(payload)
        if length > min(self._value_bytes_max, length_of(room)):
            return None
        scatter(payload[_LENGTH.size : _LENGTH.size + length], room)
        return int(length)

    def _is_proven(self, key: BlockKey, slot: int, payload: memoryview) -> bool:
        slots = np.array([slot], dtype=np.int64)
        is_named = self._view.readable(slots, key.namespace, key.group_idx, [key.block_hash])[0]
        found = b"".join(self._digests(payload))
        return bool(is_named) and self._view.digests[slot].tobytes() == found

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Forget; a slot that is just being read is free when that has ended."""
        for key in keys:
            self._handle(on.BlocksFoundCorrupt(key.namespace, key.group_idx, [key.block_hash]))

    # ---- capabilities

    def lookup(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Ask the ledger, without counting it as a use."""
        return [self._is_ready(key) for key in keys]

    def keys(self) -> Iterator[BlockKey]:
        """All keys of one moment."""
        with self._lock:
            return iter([slot.key for slot in self._node.ledger.ready_slots() if slot.key])

    def use(self) -> TierUse:
        """Slots in use; a slot counts whole."""
        with self._lock:
            num_values = self._node.ledger.num_by_state[BlockState.READY]
            num_slots = len(self._node.ledger.slots)
        return TierUse(num_values, num_values * self._block_bytes, num_slots * self._block_bytes)

    def close(self) -> None:
        """Let go of the pool and take its file away: its ledger was this process's."""
        del self._view
        self._pool.close()
        with contextlib.suppress(FileNotFoundError):
            self._pool.remove()
