"""Memory of this process that another one can map too: found by address, handed over as a file."""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ...(.) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+)")
"""Start, end, shared or private, offset, device and inode of a mapping (proc_pid_maps(5))."""


@dataclass(frozen=True, slots=True)
class Region:
    """A range of addresses that is a range of a file."""

    address: int
    num_bytes: int
    fd: int
    """Of the file; the region's own."""
    offset: int
    """Of the first byte in the file."""
    number: int
    """What the client calls it; given by the caller, from 1."""


@dataclass(frozen=True, slots=True)
class _Mapping:
    start: int
    end: int
    is_shared: bool
    offset: int
    file: tuple[int, int]
    """Device and inode."""


def address_of(memory: memoryview) -> int:
    """Return where these bytes lie in this process; there is at least one."""
    return int(np.frombuffer(memory, dtype=np.uint8).__array_interface__["data"][0])


def find_region(memory: memoryview, number: int) -> Region | None:
    """Return the file behind this memory; None where it has none that another process could map.

    The file is found among those that this process has open, as Python's ``mmap`` keeps its own:
    its path may be gone, or be another file's by now.
    """
    if not memory.nbytes or memory.readonly:
        return None
    address = address_of(memory)
    mapping = _joined(address, address + memory.nbytes)
    if mapping is None or not mapping.is_shared:
        return None
    for fd in _open_files():
        with contextlib.suppress(OSError):  # gone since it was listed
            found = os.fstat(fd)
            if (found.st_dev, found.st_ino) == mapping.file and _is_writable(fd):
                offset = mapping.offset + address - mapping.start
                return Region(address, memory.nbytes, os.dup(fd), offset, number)
    return None


def _joined(start: int, end: int) -> _Mapping | None:
    """Return the mapping that covers a range; the kernel may list it in several pieces."""
    whole: _Mapping | None = None
    for piece in _mappings():
        if whole is None:
            if piece.start <= start < piece.end:
                whole = piece
        elif whole.end >= end:
            break
        elif _continues(whole, piece):
            whole = _Mapping(whole.start, piece.end, whole.is_shared, whole.offset, whole.file)
        else:
            return None
    return whole if whole is not None and whole.end >= end else None


def _continues(before: _Mapping, after: _Mapping) -> bool:
    is_next = after.start == before.end and after.file == before.file
    is_alike = after.is_shared == before.is_shared
    return is_next and is_alike and after.offset == before.offset + before.end - before.start


def _mappings() -> Iterator[_Mapping]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        start, end, offset, major, minor = (int(found[n], 16) for n in (1, 2, 4, 5, 6))
        file = os.makedev(major, minor), int(found[7])
        yield _Mapping(start, end, found[3] == "s", offset, file)


def _open_files() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/fd")]


def _is_writable(fd: int) -> bool:
    flags = Path(f"/proc/self/fdinfo/{fd}").read_text()
    found = re.search(r"^flags:\s+(\d+)", flags, flags=re.M)
    return found is not None and int(found[1], 8) & os.O_ACCMODE == os.O_RDWR
