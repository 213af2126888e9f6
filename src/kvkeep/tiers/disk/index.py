"""Which value lies in which slot, who is at it, and which slots are free.

Memory only: what it says is true of this process, and what is on the disk follows. Thread-safe;
its lock is never held during I/O.

A slot is free when no key points to it and nobody has it pinned. Whoever reads, writes or clears a
slot has it pinned meanwhile, so no slot is overwritten under a reader.
"""

import threading
from collections import deque
from collections.abc import Iterable

from kvkeep.core.eviction.base import EvictionPolicy, fingerprint_of
from kvkeep.model.ids import BlockKey


class SlotIndex:
    """Keys, slots and pins; order of eviction is the policy's."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._lock = threading.Lock()
        self._slots: dict[BlockKey, int] = {}
        self._keys: dict[int, BlockKey] = {}
        self._pins: dict[int, int] = {}
        self._free: deque[int] = deque()
        self._retired: set[int] = set()

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._slots

    def keys(self) -> list[BlockKey]:
        """All keys of one moment."""
        with self._lock:
            return list(self._slots)

    def add_free(self, slots: Iterable[int]) -> None:
        """These slots are there from now on, and hold nothing."""
        with self._lock:
            self._free.extend(slots)

    def touch(self, key: BlockKey) -> bool:
        """Count a use; False if there is no such value."""
        with self._lock:
            slot = self._slots.get(key)
            if slot is None:
                return False
            self._policy.used(slot)
            return True

    def pin(self, key: BlockKey) -> int | None:
        """Find a value's slot to read it, and count the use; ``unpin`` follows."""
        with self._lock:
            slot = self._slots.get(key)
            if slot is None:
                return None
            self._policy.used(slot)
            self._pins[slot] = self._pins.get(slot, 0) + 1
            return slot

    def pin_free(self) -> int | None:
        """Take a free slot to write to; ``unpin`` follows, with or without ``put``."""
        with self._lock:
            if not self._free:
                return None
            slot = self._free.popleft()
            self._pins[slot] = 1
            return slot

    def pin_evicted(self) -> int | None:
        """Forget the value that the policy names, and take its slot as ``pin_free`` does."""
        with self._lock:
            victims = self._policy.victims(1, lambda slot: slot not in self._pins)
            if not victims:
                return None
            self._unlist(victims[0])
            self._pins[victims[0]] = 1
            return victims[0]

    def pin_deleted(self, key: BlockKey) -> int | None:
        """Forget a value, and hold its slot, readers or not, until ``unpin``."""
        with self._lock:
            slot = self._slots.get(key)
            if slot is None:
                return None
            self._unlist(slot)
            self._pins[slot] = self._pins.get(slot, 0) + 1
            return slot

    def put(self, key: BlockKey, slot: int) -> bool:
        """A pinned slot holds this value now; False if another slot does already."""
        with self._lock:
            if key in self._slots:
                return False
            self._slots[key] = slot
            self._keys[slot] = key
            self._policy.added(slot, fingerprint_of(key))
            return True

    def drop(self, slot: int) -> bool:
        """What a pinned slot holds is no good; False if it was forgotten before."""
        with self._lock:
            return self._unlist(slot)

    def retire(self, slot: int) -> None:
        """Never use a pinned slot again."""
        with self._lock:
            self._retired.add(slot)

    def unpin(self, slot: int) -> None:
        """Whoever pinned it is done with it."""
        with self._lock:
            self._pins[slot] -= 1
            if self._pins[slot] > 0:
                return
            del self._pins[slot]
            if slot not in self._keys and slot not in self._retired:
                self._free.append(slot)

    def _unlist(self, slot: int) -> bool:
        key = self._keys.pop(slot, None)
        if key is None:
            return False
        del self._slots[key]
        self._policy.removed(slot)
        return True
