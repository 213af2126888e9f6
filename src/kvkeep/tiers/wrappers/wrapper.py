"""What all wrappers share: each is a tier itself, and can do just what the tier inside it can.

Threading and blocking: as the tier inside. A wrapper adds no thread and no wait of its own.
"""

import functools
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import numpy as np

from kvkeep.model.errors import UnavailableError
from kvkeep.model.ids import BlockKey
from kvkeep.tiers.base import Gauges, Lists, Parts, Probes, Registers, Tier, TierUse

SCRATCH_BYTES_MAX = 64 << 20
"""Copies that one call makes at once: a batch of large blocks goes through in several steps."""


class ProbesInner:
    """A wrapper whose inner tier ``Probes``."""

    _inner: Tier

    def lookup(self, keys: Sequence[BlockKey]) -> list[bool]:
        """As the inner tier: whether there is a value, not whether it is right."""
        return cast(Probes, self._inner).lookup(keys)


class ListsInner:
    """A wrapper whose inner tier ``Lists``."""

    _inner: Tier

    def keys(self) -> Iterator[BlockKey]:
        """As the inner tier."""
        return cast(Lists, self._inner).keys()


class RegistersInner:
    """A wrapper whose inner tier ``Registers``."""

    _inner: Tier

    def register(self, region: memoryview) -> None:
        """As the inner tier."""
        cast(Registers, self._inner).register(region)


class GaugesInner:
    """A wrapper whose inner tier ``Gauges``."""

    _inner: Tier

    def use(self) -> TierUse:
        """As the inner tier, so that what wrappers add to a value is counted."""
        return cast(Gauges, self._inner).use()


class Wrapper:
    """A tier around a tier, with exactly its capabilities.

    ``isinstance(wrapper, Probes)`` holds where it holds for the inner tier, as the object is made
    of a class that has the methods of that capability or has none: a method that only raises would
    look like a capability.
    """

    ABILITIES: ClassVar[Mapping[type, type]] = {
        Probes: ProbesInner,
        Lists: ListsInner,
        Registers: RegistersInner,
        Gauges: GaugesInner,
    }
    """What brings the methods of each capability."""

    def __new__(cls, inner: Tier, *_settings: Any, **_more_settings: Any) -> Self:
        """Make an instance that can what ``inner`` can."""
        able = (brought for kind, brought in cls.ABILITIES.items() if isinstance(inner, kind))
        return cast(Self, super().__new__(_joined(cast(Hashable, cls), tuple(able))))

    def __init__(self, inner: Tier) -> None:
        self._inner = inner

    @property
    def name(self) -> str:
        """The inner tier's: it is still the same place."""
        return self._inner.name

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Forget these values in the inner tier."""
        self._inner.delete(keys)

    def close(self) -> None:
        """Close the inner tier, which belongs to the wrapper."""
        self._inner.close()


@functools.cache
def _joined(kind: Hashable, abilities: tuple[type, ...]) -> type[Wrapper]:
    assert isinstance(kind, type)
    names = {"__doc__": kind.__doc__, "__module__": kind.__module__}
    return type(kind.__name__, (kind, *abilities), names)


class Checking(Wrapper):
    """A wrapper that finds some of what it reads wrong: a miss, counted, and deleted inside.

    Deleted, as a tier may keep what it has when the same key is written again, and the block would
    stay lost. Another thread may have mended the value meanwhile: then it is written once more.
    """

    def __init__(self, inner: Tier, reasons: Sequence[str]) -> None:
        super().__init__(inner)
        self._counts = dict.fromkeys([*reasons, "deletions_failed"], 0)
        self._counts_lock = threading.Lock()

    def counts(self) -> dict[str, int]:
        """What was found wrong since the start, by reason; every number only grows."""
        with self._counts_lock:
            return dict(self._counts)

    def _count(self, reason: str, number: int = 1) -> None:
        with self._counts_lock:
            self._counts[reason] += number

    def _reject(self, wrong: Sequence[tuple[BlockKey, str]]) -> None:
        """Count values by what is wrong with them, and have the inner tier forget them."""
        if not wrong:
            return
        for _, reason in wrong:
            self._count(reason)
        try:
            self._inner.delete([key for key, _ in wrong])
        except UnavailableError:
            self._count("deletions_failed", len(wrong))


def leading(parts: Parts, length: int) -> list[memoryview]:
    """The first ``length`` bytes of these parts, without a copy."""
    found: list[memoryview] = []
    for part in parts:
        size = min(part.nbytes, length)
        if size:
            found.append(part[:size])
        length -= size
    return found


def unset_bytes(length: int) -> memoryview:
    """Memory of this length to be filled; numpy's, as a ``bytearray`` would be zeroed first."""
    return np.empty(length, dtype=np.uint8).data


def in_steps(lengths: Sequence[int]) -> Iterator[slice]:
    """Cut a batch so that each step copies ``SCRATCH_BYTES_MAX`` at most, or one value."""
    start = total = 0
    for idx, length in enumerate(lengths):
        if idx > start and total + length > SCRATCH_BYTES_MAX:
            yield slice(start, idx)
            start, total = idx, 0
        total += length
    if start < len(lengths):
        yield slice(start, len(lengths))
