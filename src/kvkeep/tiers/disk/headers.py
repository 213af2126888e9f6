"""The file of headers: which slot holds what.

It is written through the page cache, apart from the values, which mostly go around it: a header is
written, read again and cleared in microseconds, and all are read at the start in one sweep.

Safe to use from several threads, each with slots of its own. Every method but ``close`` raises the
``OSError`` of the system.
"""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from kvkeep.tiers.disk.entries import (
    ENTRY_BYTES,
    PAGE_BYTES,
    Entry,
    Geometry,
    find_entries,
    pack_entry,
    pack_geometry,
    unpack_entry,
    unpack_geometry,
)

NAME = "headers.kvkeep"
_SCAN_SLOTS = 1 << 13
"""A mebibyte of headers at a time."""
_FREE = bytes(ENTRY_BYTES)


class HeaderFile:
    """The open file; it carries the folder's lock."""

    def __init__(self, folder: Path) -> None:
        """Open or create the file of a folder, without a look inside.

        Raises:
            BlockingIOError: Another process has the folder.
        """
        self.path = folder / NAME
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(self.path, flags, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise

    def is_empty(self) -> bool:
        """Whether nothing was ever written to it."""
        return os.fstat(self._fd).st_size == 0

    def find_geometry(self) -> Geometry | None:
        """What the folder's page says; None if nothing that can be used."""
        return unpack_geometry(os.pread(self._fd, PAGE_BYTES, 0))

    def reset(self) -> None:
        """Forget everything."""
        os.ftruncate(self._fd, 0)

    def prepare(self, geometry: Geometry, num_slots: int) -> None:
        """Make room for the headers of so many slots, and say how they are cut."""
        num_bytes = PAGE_BYTES + num_slots * ENTRY_BYTES
        if os.fstat(self._fd).st_size > num_bytes:
            os.ftruncate(self._fd, num_bytes)
        os.posix_fallocate(self._fd, 0, num_bytes)
        _write(self._fd, pack_geometry(geometry), 0)

    def scan(self) -> Iterator[tuple[int, Entry | None]]:
        """Every slot whose header is not free; None for one that is torn or rotten."""
        first_slot = 0
        while table := os.pread(self._fd, _SCAN_SLOTS * ENTRY_BYTES, _offset(first_slot)):
            yield from find_entries(first_slot, table)
            first_slot += _SCAN_SLOTS

    def read(self, slot: int) -> Entry | None:
        """The header of a slot; None if it is free, torn or rotten."""
        return unpack_entry(slot, os.pread(self._fd, ENTRY_BYTES, _offset(slot)))

    def write(self, slot: int, entry: Entry) -> None:
        """From now on, also for a later process, the slot holds this value."""
        _write(self._fd, pack_entry(slot, entry), _offset(slot))

    def clear(self, slot: int) -> None:
        """From now on the slot holds nothing."""
        _write(self._fd, _FREE, _offset(slot))

    def close(self) -> None:
        """Give the lock back; the file stays."""
        # A child forked meanwhile has the descriptor too, and with it the lock: unlock by name.
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        os.close(self._fd)


def _offset(slot: int) -> int:
    return PAGE_BYTES + slot * ENTRY_BYTES


def _write(fd: int, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(fd, rest, offset)
        rest, offset = rest[written:], offset + written
