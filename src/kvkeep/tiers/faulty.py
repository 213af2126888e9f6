"""A tier with named faults, struck by a seed: for tests, and for a stack that asks for them.

Every fault is one that a medium, a network or a neighbor has in store. What is read wrong is wrong
in the reader's room only: the inner tier keeps what was written.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from random import Random

from kvkeep.model.clock import Clock, SystemClock
from kvkeep.model.errors import UnavailableError
from kvkeep.model.ids import BlockKey
from kvkeep.tiers.base import Parts, Tier
from kvkeep.tiers.wrappers.wrapper import Wrapper, leading

KNOWN_KEYS_MAX = 1024
"""Keys kept in mind, to have another value at hand."""


class TierFault(Enum):
    """What can go wrong; the value is its name in settings, logs and docs/failure-modes.md."""

    BIT_FLIP = "bit flip"
    """A read value has one bit changed."""
    TRUNCATION = "truncation"
    """A read value ends early."""
    SWAP = "two blocks swapped"
    """A read gives another key's value."""
    WRONG_TENANT = "wrong tenant"
    """A read gives the value of a key of another namespace."""
    ZEROED = "zeroed"
    """A read value is all zeros."""
    MOVED = "pages in another place"
    """The parts of a read value stand one place further on, as of a wrong layer or head."""
    DISK_FULL = "ENOSPC"
    """A written value is declined."""
    IO_ERROR = "EIO"
    """A read or write fails."""
    READ_ONLY = "EROFS"
    """A write or delete fails."""
    CUT = "cut in mid-value"
    """A read or write fails when a part of the bytes has gone over."""
    SLOW = "slow"
    """A read or write takes ``slow_factor`` times as long."""
    HANG = "hang"
    """A call does not return until ``release``."""


WRONG_READS = (
    TierFault.BIT_FLIP,
    TierFault.TRUNCATION,
    TierFault.SWAP,
    TierFault.WRONG_TENANT,
    TierFault.ZEROED,
    TierFault.MOVED,
)
"""What can be wrong with the bytes of a value that was read."""
MOVED_SHARE = 8
"""Of a moved value's length, one part in so many is how far it moves."""


class FaultyTier(Wrapper):
    """A tier that goes wrong on purpose. Thread-safe.

    ``chances`` says how often each fault strikes: per value what is wrong with a value, per call
    what is wrong with a call; 1.0 is always. It may be replaced at any time, as ``{}`` to heal.
    """

    def __init__(
        self,
        inner: Tier,
        chances: Mapping[TierFault, float],
        seed: int,
        *,
        slow_factor: float = 10.0,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(inner)
        self.chances = dict(chances)
        self.num_struck = dict.fromkeys(TierFault, 0)
        """How often each fault struck."""
        self.slow_factor = slow_factor
        self.reached = threading.Event()
        """Set when a call hangs."""
        self.sleep: Callable[[float], None] = time.sleep
        """How a slow call waits."""
        self._released = threading.Event()
        self._chance = Random(seed)
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._known: dict[BlockKey, None] = {}

    def release(self) -> None:
        """Let every call that hangs go on, and hang no more."""
        self.chances = {**self.chances, TierFault.HANG: 0.0}
        self._released.set()

    def write(self, keys: Sequence[BlockKey], values: Sequence[Parts]) -> list[bool]:
        """As the inner tier, or not."""
        with self._call(TierFault.READ_ONLY, TierFault.IO_ERROR):
            if self._strikes(TierFault.CUT):
                raise _failure(self.name, TierFault.CUT)
            wanted = [idx for idx in range(len(keys)) if not self._strikes(TierFault.DISK_FULL)]
            answers = self._inner.write(
                [keys[idx] for idx in wanted], [values[idx] for idx in wanted]
            )
            kept = [False] * len(keys)
            for idx, is_kept in zip(wanted, answers, strict=True):
                kept[idx] = is_kept
            self._note([keys[idx] for idx in wanted])
            return kept

    def read(self, keys: Sequence[BlockKey], into: Sequence[Parts]) -> list[int | None]:
        """As the inner tier, or not."""
        with self._call(TierFault.IO_ERROR):
            found = self._inner.read(keys, into)
            if self._strikes(TierFault.CUT):
                self._tear(into, found)
                raise _failure(self.name, TierFault.CUT)
            return [
                self._spoil(key, room, length)
                for key, room, length in zip(keys, into, found, strict=True)
            ]

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """As the inner tier, or not."""
        with self._call(TierFault.READ_ONLY):
            self._inner.delete(keys)

    def close(self) -> None:
        """Let go whatever hangs, and close the inner tier."""
        self.release()
        super().close()

    # ---- faults of calls

    @contextmanager
    def _call(self, *errors: TierFault) -> Iterator[None]:
        """One call: it may hang, fail at once, or take long."""
        if self._strikes(TierFault.HANG):
            self.reached.set()
            self._released.wait()
        for fault in errors:
            if self._strikes(fault):
                raise _failure(self.name, fault)
        begun_s = self._clock.now_s()
        yield
        if self._strikes(TierFault.SLOW):
            self.sleep((self._clock.now_s() - begun_s) * (self.slow_factor - 1))

    def _strikes(self, fault: TierFault) -> bool:
        chance = self.chances.get(fault, 0.0)
        if not chance:
            return False
        with self._lock:
            is_struck = self._chance.random() < chance
            self.num_struck[fault] += is_struck
        return is_struck

    # ---- faults of values

    def _note(self, keys: Sequence[BlockKey]) -> None:
        with self._lock:
            self._known.update(dict.fromkeys(keys))
            while len(self._known) > KNOWN_KEYS_MAX:
                del self._known[next(iter(self._known))]

    def _spoil(self, key: BlockKey, room: Parts, length: int | None) -> int | None:
        """Make a value wrong that was read right; returns the length it has now."""
        if not length:
            return length
        for fault in WRONG_READS:
            if not self._strikes(fault):
                continue
            if fault is TierFault.BIT_FLIP:
                self._flip(leading(room, length))
            elif fault is TierFault.TRUNCATION:
                return self._below(length)
            elif fault in (TierFault.ZEROED, TierFault.MOVED):
                _rewrite(leading(room, length), fault)
            else:
                return self._mistake(key, room, length, fault)
        return length

    def _below(self, number: int) -> int:
        with self._lock:
            return self._chance.randrange(number)

    def _flip(self, parts: Parts) -> None:
        at = self._below(sum(part.nbytes for part in parts))
        for part in parts:
            if at < part.nbytes:
                part[at] ^= 1 << self._below(8)
                return
            at -= part.nbytes

    def _mistake(self, key: BlockKey, room: Parts, length: int, fault: TierFault) -> int | None:
        """Read another key's value into this key's room; the right one if no other is known."""
        with self._lock:
            others = [
                other
                for other in self._known
                if other != key and (fault is TierFault.SWAP or other.namespace != key.namespace)
            ]
        if not others:
            return length
        return self._inner.read([others[self._below(len(others))]], [room])[0]

    def _tear(self, into: Sequence[Parts], found: Sequence[int | None]) -> None:
        """Leave the leading part of each value and rubbish behind it."""
        for room, length in zip(into, found, strict=True):
            rest = self._below(length) if length else 0
            for part in leading(room, length or 0):
                kept = min(rest, part.nbytes)
                part[kept:] = b"\xa5" * (part.nbytes - kept)
                rest -= kept


def _rewrite(parts: Parts, fault: TierFault) -> None:
    """Zero a value, or turn it round by a part of its length."""
    value = b"".join(parts)
    step = max(1, len(value) // MOVED_SHARE)
    made = bytes(len(value)) if fault is TierFault.ZEROED else value[-step:] + value[:-step]
    start = 0
    for part in parts:
        part[:] = made[start : start + part.nbytes]
        start += part.nbytes


def _failure(name: str, fault: TierFault) -> UnavailableError:
    return UnavailableError(f"the tier {name} failed as it was told to: {fault.value}")
