"""The seam to a place that keeps whole blocks by key, outside the engine and beside the pool.

A tier knows keys, bytes and lengths. What a block's bytes mean, whether they are still right, who
may read them and what is worth keeping is decided by others: wrappers around the tier, and the
core.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from kvkeep.model.ids import BlockKey

Parts = Sequence[memoryview]
"""One value, or room for one, in pieces that follow each other: C-contiguous, of bytes (format
``B``).

In pieces, so that a header and a slot of the pool are written together without copying either.
"""

VALUE_BYTES_MAX = 1 << 30
"""Far above any block (0.7 to 40 MiB); more is a slip in somebody's arithmetic."""

BATCH_MAX = 1 << 10
"""Keys in one call; callers cut longer batches."""


class Tier(Protocol):
    """Keeps values by block key.

    What it promises:
        * a read gives all bytes of one value that was written under exactly that key, or says that
          it has none; never a part, a mixture, or another key's value;
        * it may forget a value at any time: a tier is a cache. Where it outlives its process, what
          it says it kept is there after a SIGKILL, or is gone, or is found torn by the digests
          around it;
        * a value written again under its key is the same value, as equal keys hold equal bytes:
          either may stay;
        * every failure of the medium is an ``UnavailableError``, within the tier's own time limit
          where the medium has one (a network has; a disk that hangs has none, and the call hangs
          with it).

    Life of one value: ``write`` by a caller that holds its bytes still; ``read`` into memory that
    is the caller's; ``delete`` when it is unwanted or was found rotten; forgotten by the tier when
    room is short.

    The caller guarantees:
        * ``len(keys) == len(values) <= BATCH_MAX``, no key twice in one call, no value longer than
          the tier was made for;
        * nobody changes the bytes of a write, or touches the room of a read, until the call has
          returned.

    Threading and blocking: every method blocks until its batch is done, and may be called from
    several threads at once. What is in ``into`` where a read failed is undefined.
    """

    @property
    def name(self) -> str:
        """Stable label for metrics and messages: ``disk``, ``valkey``, ..."""

    def write(self, keys: Sequence[BlockKey], values: Sequence[Parts]) -> list[bool]:
        """Keep these values.

        Returns:
            ``[num_keys]``: True where it is kept now; False where it was declined, as for want of
            room.

        Raises:
            UnavailableError: The tier can't be written now. Each value is there whole or not at
                all.
        """

    def read(self, keys: Sequence[BlockKey], into: Sequence[Parts]) -> list[int | None]:
        """Fill ``into[i]`` with the value of ``keys[i]``, from its start.

        Returns:
            ``[num_keys]``: bytes of the value; None where there is no such value, or it does not
            fit.

        Raises:
            UnavailableError: The tier can't be read now.
        """

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Forget these values; a key without one is no error.

        Raises:
            UnavailableError: The tier can't be reached now; some may be gone.
        """

    def close(self) -> None:
        """Give back what the tier holds of this process; what it keeps stays. Called once, last."""


@runtime_checkable
class Probes(Protocol):
    """A tier that can tell, much faster than it reads, whether a value is there."""

    def lookup(self, keys: Sequence[BlockKey]) -> list[bool]:
        """``[num_keys]``: whether a read would find a value now, as far as the tier knows.

        Raises:
            UnavailableError: As for a read.
        """


@runtime_checkable
class Lists(Protocol):
    """A tier that knows all its keys."""

    def keys(self) -> Iterator[BlockKey]:
        """Every key with a value, in no order; what comes and goes meanwhile may be missed.

        Raises:
            UnavailableError: As for a read; also in the middle.
        """


@runtime_checkable
class Registers(Protocol):
    """A tier that moves bytes faster from and to memory that it knows beforehand."""

    def register(self, region: memoryview) -> None:
        """Make this memory known until ``close``; parts inside it are moved without a copy.

        Raises:
            UnavailableError: The medium refused; moves work as before.
        """


@runtime_checkable
class FindsRot(Protocol):
    """A tier that finds some of what it reads wrong by itself, and drops it."""

    @property
    def num_rotten(self) -> int:
        """Values found since the start; only grows."""


@dataclass(frozen=True, slots=True)
class TierUse:
    """How full a tier is."""

    num_values: int
    used_bytes: int
    capacity_bytes: int | None
    """None where the tier does not know or has no limit of its own."""


@runtime_checkable
class Gauges(Protocol):
    """A tier that knows how full it is without asking far away."""

    def use(self) -> TierUse:
        """Values and bytes that are kept now; never blocks for the medium."""


def length_of(value: Parts) -> int:
    """Bytes of a value, or of the room for one."""
    return sum(part.nbytes for part in value)
