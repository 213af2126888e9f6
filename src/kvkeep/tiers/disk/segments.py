"""The files that hold the values: segments of equal slots, each segment allocated as a whole.

Where the file system allows it they are opened for direct I/O: values are large and rarely read
twice in a row, and the page cache would hold them beside the pool that they are read into.

Safe to use from several threads, each with slots of its own; only one may ``grow``. Every method
but ``close`` raises the ``OSError`` of the system.
"""

import contextlib
import mmap
import os
import queue
import re
from pathlib import Path

from kvkeep.tiers.base import Parts
from kvkeep.tiers.disk.entries import PAGE_BYTES, Geometry
from kvkeep.tiers.disk.pieces import choose_start, find_route, move_all

_NAME = "segment-{:04d}.kvkeep"
_ANY_NAME = re.compile(r"segment-\d{4,}\.kvkeep")
_REFUSALS = (22, 95)
"""EINVAL, EOPNOTSUPP: how file systems say that they have no direct I/O."""


def allows_direct(path: Path) -> bool:
    """Try direct I/O on a file of a page or more, which is not changed."""
    page = _memory(PAGE_BYTES)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno in _REFUSALS:
            return False
        raise
    try:
        return os.preadv(fd, [page], 0) == PAGE_BYTES
    except OSError as error:
        if error.errno in _REFUSALS:
            return False
        raise
    finally:
        os.close(fd)


def remove_all(folder: Path) -> None:
    """Delete every segment of a folder; other files are not touched."""
    for path in folder.iterdir():
        if _ANY_NAME.fullmatch(path.name):
            path.unlink()


class Segments:
    """The open segment files of one folder."""

    def __init__(
        self, folder: Path, geometry: Geometry, num_slots: int, *, is_direct: bool, num_moves: int
    ) -> None:
        """Open the segments that are there; those beyond the slots are deleted.

        Args:
            folder: Where they are.
            geometry: How they are cut.
            num_slots: All slots that there may be, in segments that are there or may come.
            is_direct: Go around the page cache.
            num_moves: Values that move at once at most; each has scratch memory of a slot.
        """
        self._folder = folder
        self._geometry = geometry
        self._num_slots = num_slots
        self.is_direct = is_direct
        self._fds: dict[int, int] = {}
        self._scratch: queue.LifoQueue[memoryview] = queue.LifoQueue()
        for _ in range(num_moves):
            self._scratch.put(memoryview(_memory(geometry.slot_bytes)))
        self._num_segments = -(-num_slots // geometry.slots_per_segment)
        self._kept: dict[int, int] = {}
        """Slots of each segment that were whole when it was opened."""
        try:
            self._open_all()
        except BaseException:
            self.close()
            raise

    def _open_all(self) -> None:
        for path in self._folder.iterdir():
            if _ANY_NAME.fullmatch(path.name):
                idx = int(path.name.removeprefix("segment-").removesuffix(".kvkeep"))
                if idx >= self._num_segments:
                    path.unlink()
                else:
                    self._open(idx)

    def _open(self, idx: int) -> None:
        fd = self._open_file(idx, os.O_RDWR)
        self._kept[idx] = min(
            os.fstat(fd).st_size // self._geometry.slot_bytes, len(self.slots_of(idx))
        )
        try:
            self._allocate(idx, fd)
        except OSError:
            # It was cut and there is no room to mend it. Its values go with it: a file with
            # holes would want room again at every write.
            os.close(fd)
            self._path(idx).unlink()
            return
        self._fds[idx] = fd

    def _open_file(self, idx: int, flags: int) -> int:
        flags |= os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_DIRECT if self.is_direct else 0)
        return os.open(self._path(idx), flags, 0o600)

    def _allocate(self, idx: int, fd: int) -> None:
        num_bytes = len(self.slots_of(idx)) * self._geometry.slot_bytes
        if os.fstat(fd).st_size > num_bytes:
            os.ftruncate(fd, num_bytes)
        os.posix_fallocate(fd, 0, num_bytes)

    def _path(self, idx: int) -> Path:
        return self._folder / _NAME.format(idx)

    def slots_of(self, idx: int) -> range:
        """The slots of a segment; the last segment may have fewer than the others."""
        first = idx * self._geometry.slots_per_segment
        return range(first, min(first + self._geometry.slots_per_segment, self._num_slots))

    def slots(self) -> list[int]:
        """Slots of all segments that are there."""
        return [slot for idx in sorted(self._fds) for slot in self.slots_of(idx)]

    def has_kept(self, slot: int) -> bool:
        """Whether the slot was there, whole, when the segments were opened."""
        idx, place = divmod(slot, self._geometry.slots_per_segment)
        return idx in self._fds and place < self._kept[idx]

    def grow(self) -> range:
        """Add a segment.

        Returns:
            Its slots; none when all segments are there.

        Raises:
            OSError: There is no room for it, or the folder is gone; nothing was added.
        """
        missing = (idx for idx in range(self._num_segments) if idx not in self._fds)
        idx = next(missing, None)
        if idx is None:
            return range(0)
        fd = self._open_file(idx, os.O_RDWR | os.O_CREAT)
        try:
            self._allocate(idx, fd)
        except OSError:
            os.close(fd)
            with contextlib.suppress(OSError):
                self._path(idx).unlink()
            raise
        self._kept[idx] = 0
        self._fds[idx] = fd
        return self.slots_of(idx)

    def write(self, slot: int, value: Parts) -> int:
        """Write a value, whose length fits; returns where in the slot it begins.

        Args:
            slot: Pinned by the caller.
            value: No empty part.
        """
        fd, offset = self._place(slot)
        if not self.is_direct:
            move_all(os.pwritev, fd, value, offset)
            return 0
        start = choose_start(value)
        scratch = self._scratch.get()
        try:
            route = find_route(value, start, scratch)
            route.fill_scratch()
            move_all(os.pwritev, fd, route.iovecs, offset)
        finally:
            self._scratch.put(scratch)
        return start

    def read(self, slot: int, start: int, room: Parts) -> bool:
        """Fill the room from a slot; False where the file ends too early.

        Args:
            slot: Pinned by the caller.
            start: What ``write`` returned.
            room: As long as the value; no empty part.
        """
        fd, offset = self._place(slot)
        if not self.is_direct:
            wanted = sum(part.nbytes for part in room)
            return move_all(os.preadv, fd, room, offset + start) == wanted
        scratch = self._scratch.get()
        try:
            route = find_route(room, start, scratch)
            wanted = sum(view.nbytes for view in route.iovecs)
            if move_all(os.preadv, fd, route.iovecs, offset) != wanted:
                return False
            route.empty_scratch()
        finally:
            self._scratch.put(scratch)
        return True

    def _place(self, slot: int) -> tuple[int, int]:
        idx, place = divmod(slot, self._geometry.slots_per_segment)
        return self._fds[idx], place * self._geometry.slot_bytes

    def close(self) -> None:
        """Close the files; they stay."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def _memory(num_bytes: int) -> mmap.mmap:
    """Page-aligned memory of this process; it takes room only where it was touched."""
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
