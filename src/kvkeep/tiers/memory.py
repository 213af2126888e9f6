"""A tier in this process's memory: the contract in the fewest lines, and a double in tests."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from kvkeep.model.ids import BlockKey
from kvkeep.tiers.base import Parts, TierUse, length_of


class MemoryTier:
    """Keeps copies up to a number of bytes, dropping the least recently used. Thread-safe."""

    def __init__(self, capacity_bytes: int, name: str = "memory") -> None:
        self.name = name
        self._capacity_bytes = capacity_bytes
        self._values: OrderedDict[BlockKey, bytes] = OrderedDict()
        self._used_bytes = 0
        self._lock = threading.Lock()

    def write(self, keys: Sequence[BlockKey], values: Sequence[Parts]) -> list[bool]:
        """Keep copies; declines a value larger than the whole tier."""
        copies = [b"".join(value) for value in values]
        with self._lock:
            return [self._put(key, copy) for key, copy in zip(keys, copies, strict=True)]

    def _put(self, key: BlockKey, value: bytes) -> bool:
        if len(value) > self._capacity_bytes:
            return False
        self._drop(key)
        while self._used_bytes + len(value) > self._capacity_bytes:
            self._drop(next(iter(self._values)))
        self._values[key] = value
        self._used_bytes += len(value)
        return True

    def _drop(self, key: BlockKey) -> None:
        value = self._values.pop(key, None)
        if value is not None:
            self._used_bytes -= len(value)

    def read(self, keys: Sequence[BlockKey], into: Sequence[Parts]) -> list[int | None]:
        """Copy values out and count the use."""
        return [self._read_one(key, room) for key, room in zip(keys, into, strict=True)]

    def _read_one(self, key: BlockKey, room: Parts) -> int | None:
        with self._lock:
            value = self._values.get(key)
            if value is None or len(value) > length_of(room):
                return None
            self._values.move_to_end(key)
        scatter(value, room)
        return len(value)

    def lookup(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Look, without counting it as a use."""
        with self._lock:
            return [key in self._values for key in keys]

    def keys(self) -> Iterator[BlockKey]:
        """All keys of one moment."""
        with self._lock:
            return iter(list(self._values))

    def use(self) -> TierUse:
        """How full it is."""
        with self._lock:
            return TierUse(len(self._values), self._used_bytes, self._capacity_bytes)

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Forget."""
        with self._lock:
            for key in keys:
                self._drop(key)

    def close(self) -> None:
        """Drop everything: this memory is the process's."""
        with self._lock:
            self._values.clear()
            self._used_bytes = 0


def scatter(value: bytes | memoryview, room: Parts) -> None:
    """Copy a value into the leading bytes of the room, which is large enough."""
    rest = memoryview(value)
    for part in room:
        size = min(part.nbytes, len(rest))
        part[:size] = rest[:size]
        rest = rest[size:]
