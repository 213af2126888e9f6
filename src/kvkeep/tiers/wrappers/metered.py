"""What a tier really does: counts, bytes, and the speed that decides whether to read it at all.

A planner asks how long a read would take. Calls are told apart by what they cost each and what each
byte costs: a straight line through the recent (bytes, seconds) of calls that moved something. Old
calls count less and less, so that a medium that became slow is known to be slow after a few calls.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar, cast

from kvkeep.model.clock import Clock, SystemClock
from kvkeep.model.errors import UnavailableError
from kvkeep.model.ids import BlockKey
from kvkeep.tiers.base import Parts, Probes, Tier, length_of
from kvkeep.tiers.wrappers.wrapper import ProbesInner, Wrapper

DECAY = 0.9
"""What a call counts beside the one after it: half of the estimate is from the last seven."""

SPREAD_MIN = 0.01
"""Squared coefficient of variation of the calls' bytes from which on a line means something."""

Answer = TypeVar("Answer")


class Speed:
    """Seconds of a call as a line over its bytes, fitted to recent calls. Not thread-safe."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, num_bytes: int, seconds: float) -> None:
        """Take in a call that moved something."""
        new = (1.0, num_bytes, seconds, num_bytes * num_bytes, num_bytes * seconds)
        old = (self._weight, self._x, self._y, self._xx, self._xy)
        self._weight, self._x, self._y, self._xx, self._xy = (
            before * DECAY + now for before, now in zip(old, new, strict=True)
        )

    def line(self) -> tuple[float, float] | None:
        """Seconds of a call without bytes, and of one byte more; None before the first call."""
        if not self._weight:
            return None
        spread = self._weight * self._xx - self._x * self._x
        # Calls of about one size tell nothing about a call without bytes, nor do lines that noise
        # tilted: then all the time is put down to the bytes.
        if spread > SPREAD_MIN * self._x * self._x:
            a_byte_s = (self._weight * self._xy - self._x * self._y) / spread
            call_s = (self._y - a_byte_s * self._x) / self._weight
            if a_byte_s > 0 and call_s >= 0:
                return call_s, a_byte_s
        return 0.0, self._y / self._x


@dataclass(frozen=True, slots=True)
class OperationMeter:
    """What one operation of a tier did since the start, and how fast it is lately."""

    num_calls: int = 0
    """Calls that ended, well or not."""
    num_errors: int = 0
    """Calls that ended with an error."""
    num_keys: int = 0
    """Keys asked in calls that ended well."""
    num_done: int = 0
    """Of those: hits of a read or probe, values kept by a write, keys of a delete."""
    num_bytes: int = 0
    """Bytes of the values moved."""
    busy_s: float = 0.0
    """Time in calls; of several threads, added up."""
    call_s: float | None = None
    """What a call takes beside its bytes; None before something was moved."""
    bytes_per_s: float | None = None
    """Beyond that; None before something was moved."""

    @property
    def num_undone(self) -> int:
        """Misses of a read or probe, values declined by a write."""
        return self.num_keys - self.num_done

    def estimate_s(self, num_bytes: int) -> float | None:
        """What one more call of so many bytes would take; None before something was moved."""
        if self.call_s is None or self.bytes_per_s is None:
            return None
        return self.call_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class TierMeter:
    """One moment of a ``MeteredTier``."""

    read: OperationMeter
    write: OperationMeter
    delete: OperationMeter
    probe: OperationMeter

    def estimate_read_s(self, num_bytes: int) -> float | None:
        """What a read of so many bytes would take, alone; None before the first hit."""
        return self.read.estimate_s(num_bytes)

    def estimate_write_s(self, num_bytes: int) -> float | None:
        """What a write of so many bytes would take, alone; None before the first."""
        return self.write.estimate_s(num_bytes)


class _Operation:
    """The running numbers of one operation; the tier's lock is held."""

    def __init__(self) -> None:
        self.num_calls = self.num_errors = self.num_keys = self.num_done = self.num_bytes = 0
        self.busy_s = 0.0
        self.speed = Speed()

    def snapshot(self) -> OperationMeter:
        line = self.speed.line()
        return OperationMeter(
            self.num_calls,
            self.num_errors,
            self.num_keys,
            self.num_done,
            self.num_bytes,
            self.busy_s,
            None if line is None else line[0],
            None if line is None else 1.0 / line[1],
        )


class _MeteredProbes(ProbesInner):
    """The capability of a ``MeteredTier`` whose inner tier ``Probes``."""

    def lookup(self, keys: Sequence[BlockKey]) -> list[bool]:
        """As the inner tier, measured."""
        tier = cast(MeteredTier, self)
        ask = super().lookup
        return tier.measure(
            tier.probing, lambda: ask(keys), lambda found: (len(keys), sum(found), 0)
        )


class MeteredTier(Wrapper):
    """A tier whose calls are counted and timed. Thread-safe as the tier inside."""

    ABILITIES: ClassVar = {**Wrapper.ABILITIES, Probes: _MeteredProbes}

    def __init__(self, inner: Tier, clock: Clock | None = None) -> None:
        super().__init__(inner)
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._reading, self._writing, self._deleting = _Operation(), _Operation(), _Operation()
        self.probing = _Operation()

    def write(self, keys: Sequence[BlockKey], values: Sequence[Parts]) -> list[bool]:
        """As the inner tier, measured."""

        def moved(kept: list[bool]) -> tuple[int, int, int]:
            pairs = zip(values, kept, strict=True)
            lengths = [length_of(value) for value, is_kept in pairs if is_kept]
            return len(keys), len(lengths), sum(lengths)

        return self.measure(self._writing, lambda: self._inner.write(keys, values), moved)

    def read(self, keys: Sequence[BlockKey], into: Sequence[Parts]) -> list[int | None]:
        """As the inner tier, measured."""

        def moved(found: list[int | None]) -> tuple[int, int, int]:
            lengths = [length for length in found if length is not None]
            return len(keys), len(lengths), sum(lengths)

        return self.measure(self._reading, lambda: self._inner.read(keys, into), moved)

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """As the inner tier, measured."""
        count = len(keys)
        self.measure(self._deleting, lambda: self._inner.delete(keys), lambda _: (count, count, 0))

    def measure(
        self,
        operation: _Operation,
        call: Callable[[], Answer],
        moved: Callable[[Answer], tuple[int, int, int]],
    ) -> Answer:
        """Make a call and count it; ``moved`` tells keys, keys that were done, and bytes."""
        begun_s = self._clock.now_s()
        try:
            answer = call()
        except UnavailableError:
            with self._lock:
                operation.num_calls += 1
                operation.num_errors += 1
                operation.busy_s += self._clock.now_s() - begun_s
            raise
        seconds = self._clock.now_s() - begun_s
        num_keys, num_done, num_bytes = moved(answer)
        with self._lock:
            operation.num_calls += 1
            operation.num_keys += num_keys
            operation.num_done += num_done
            operation.num_bytes += num_bytes
            operation.busy_s += seconds
            if num_bytes and seconds > 0:
                operation.speed.add(num_bytes, seconds)
        return answer

    def meter(self) -> TierMeter:
        """What was counted and measured until now."""
        with self._lock:
            return TierMeter(
                self._reading.snapshot(),
                self._writing.snapshot(),
                self._deleting.snapshot(),
                self.probing.snapshot(),
            )

    def estimate_read_s(self, num_bytes: int) -> float | None:
        """As ``TierMeter.estimate_read_s`` now."""
        return self.meter().estimate_read_s(num_bytes)
