"""How a value in the caller's memory meets whole pages of a file.

Direct I/O moves whole pages between aligned places only. A value begins in its slot where its
largest part then lies to the page as it does in memory, so that the part's whole pages move
without a copy; what is left over, mostly an edge, goes through scratch memory:

    memory   |--header--|   ....|-------------- slot of the pool --------------|-tail-|
    file     |..header..|=============== same pages, moved directly ===========|.tail.|
             '- scratch -'                                                     '-----' scratch

A reader whose parts lie otherwise gets the same bytes with more copying.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvkeep.tiers.base import Parts, length_of
from kvkeep.tiers.disk.entries import PAGE_BYTES, round_up

IOVECS_MAX = 1024
"""Of one system call (IOV_MAX, sysconf(3))."""

Move = Callable[[int, Sequence[memoryview], int], int]
"""``os.preadv`` or ``os.pwritev``."""


@dataclass(frozen=True, slots=True)
class _Staged:
    """A range of the slot that passes through scratch memory."""

    begin: int
    end: int
    offset: int
    """Where in the scratch memory it lies."""


@dataclass(frozen=True, slots=True)
class Route:
    """The way of one value between memory and its slot."""

    iovecs: list[memoryview]
    """Whole aligned pages, from the slot's beginning."""
    copies: list[tuple[memoryview, memoryview]]
    """Pieces of the value, and the scratch memory that stands for each."""

    def fill_scratch(self) -> None:
        """Before a write: copy what does not move directly."""
        for piece, scratch in self.copies:
            _copy(scratch, piece)

    def empty_scratch(self) -> None:
        """After a read: copy what did not move directly."""
        for piece, scratch in self.copies:
            _copy(piece, scratch)


def leading(parts: Parts, num_bytes: int) -> list[memoryview]:
    """The first bytes of some room, which is large enough; no empty part."""
    found = []
    for part in parts:
        if num_bytes == 0:
            break
        if part.nbytes:
            found.append(part[:num_bytes])
            num_bytes -= found[-1].nbytes
    return found


def choose_start(parts: Parts) -> int:
    """Where in its first page a value begins: as its largest part asks."""
    start = largest_bytes = offset = 0
    for part in parts:
        if part.nbytes > largest_bytes:
            largest_bytes = part.nbytes
            start = (_address(part) - offset) % PAGE_BYTES
        offset += part.nbytes
    # Where no two pages lie together, everything passes through scratch memory anyway.
    return start if largest_bytes >= 2 * PAGE_BYTES else 0


def find_route(parts: Parts, start: int, scratch: memoryview) -> Route:
    """Lay a value out over whole pages.

    Args:
        parts: The value, or room of exactly its length; no empty part.
        start: Where in its first page it begins.
        scratch: Page-aligned memory as long as a slot.
    """
    end = round_up(start + length_of(parts))
    iovecs: list[memoryview] = []
    staged: list[_Staged] = []
    position = used = 0
    for begin, view in [*_direct_ranges(parts, start), (end, None)]:
        if begin > position:
            staged.append(_Staged(position, begin, used))
            iovecs.append(scratch[used : used + begin - position])
            used += begin - position
        position = begin
        if view is not None:
            iovecs.append(view)
            position += view.nbytes
    return Route(iovecs, list(_copies(parts, start, staged, scratch)))


def _direct_ranges(parts: Parts, start: int) -> Iterator[tuple[int, memoryview]]:
    """Whole pages that lie in memory as they do in the slot, with their place there."""
    position = start
    for part in parts:
        begin, end = round_up(position), (position + part.nbytes) // PAGE_BYTES * PAGE_BYTES
        if end > begin and (_address(part) - position) % PAGE_BYTES == 0:
            yield begin, part[begin - position : end - position]
        position += part.nbytes


def _copies(
    parts: Parts, start: int, staged: Sequence[_Staged], scratch: memoryview
) -> Iterator[tuple[memoryview, memoryview]]:
    """Pair what parts and staged ranges have in common; both are in order."""
    position, first = start, 0
    for part in parts:
        end = position + part.nbytes
        while first < len(staged) and staged[first].end <= position:
            first += 1
        idx = first
        while idx < len(staged) and staged[idx].begin < end:
            piece = staged[idx]
            low, high = max(position, piece.begin), min(end, piece.end)
            offset = piece.offset - piece.begin
            yield part[low - position : high - position], scratch[offset + low : offset + high]
            idx += 1
        position = end


def move_all(move: Move, fd: int, iovecs: Sequence[memoryview], offset: int) -> int:
    """Read or write all of this memory, however often the system has to be asked.

    Returns:
        Bytes moved: all, or those up to the end of the file.

    Raises:
        OSError: As the system says; some may have been moved.
    """
    rest, total = list(iovecs), 0
    while rest:
        moved = move(fd, rest[:IOVECS_MAX], offset + total)
        if moved == 0:
            break
        total += moved
        rest = _beyond(rest, moved)
    return total


def _beyond(iovecs: Sequence[memoryview], num_bytes: int) -> list[memoryview]:
    for idx, view in enumerate(iovecs):
        if num_bytes < view.nbytes:
            return [view[num_bytes:], *iovecs[idx + 1 :]]
        num_bytes -= view.nbytes
    return []


def _address(part: memoryview) -> int:
    return int(np.frombuffer(part, dtype=np.uint8).__array_interface__["data"][0])


def _copy(target: memoryview, source: memoryview) -> None:
    # Numpy lets other threads run meanwhile; assigning to a slice of a memoryview does not.
    np.copyto(np.frombuffer(target, dtype=np.uint8), np.frombuffer(source, dtype=np.uint8))
