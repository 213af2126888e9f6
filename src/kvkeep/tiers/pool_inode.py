"""The file of a pool as an inode: who owns it, and what may take its place."""

import errno
import fcntl
import os
import stat
from pathlib import Path

from kvkeep.model.errors import InputError, RefusedError

FILE_HEADER_BYTES = 4096
FILE_MAGIC = b"kvkeep pool 1\n\0\0"
READ_BYTES = 1 << 20


def open_private(path: Path) -> int:
    """Open or create a file that only this user can touch.

    Raises:
        InputError: It can't be had.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise InputError(
            f"the pool {path} can't be opened ({error.strerror}): choose another path"
        ) from error
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
        os.close(fd)
        raise InputError(f"the pool {path} is not a file of this user: choose another path")
    try:
        # Whoever can write the pool can write what engines compute with.
        os.fchmod(fd, 0o600)
    except OSError as error:
        os.close(fd)
        raise InputError(
            f"the pool {path} can't be made private ({error.strerror}): choose another path"
        ) from error
    return fd


def lock(path: Path, fd: int) -> None:
    """Own the file until it is unlocked or this process ends.

    Raises:
        RefusedError: Another daemon owns it.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RefusedError(
            f"another daemon holds the pool {path}: stop it, or give this one another pool"
        ) from error


def replace(path: Path, fd: int) -> int:
    """Put a new, empty, locked file in the place of this one.

    Engines may still have the old one mapped: cut under them, it would end them with SIGBUS.
    """
    path.unlink(missing_ok=True)
    new = open_private(path)
    try:
        lock(path, new)
    except RefusedError:
        os.close(new)
        raise
    os.close(fd)
    return new


def check_replaceable(path: Path, fd: int) -> None:
    """Refuse to overwrite what is neither empty nor a pool."""
    start = os.pread(fd, FILE_HEADER_BYTES, 0)
    # Blank is what a daemon leaves that was killed before it wrote the header.
    if start.startswith(FILE_MAGIC.rstrip(b"\0")) or _is_blank(fd):
        return
    raise InputError(f"{path} exists and is not a pool: choose another path, or remove it")


def _is_blank(fd: int) -> bool:
    """Whether a file holds zeros only, to its end: images of disks begin with kilobytes of them."""
    offset = 0
    while offset < os.fstat(fd).st_size:
        try:
            offset = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break  # only holes from here on
        data = os.pread(fd, READ_BYTES, offset)
        if data.count(0) != len(data):
            return False
        offset += len(data)
    return True


def check_room(path: Path, fd: int, pool_bytes: int) -> None:
    """Refuse a pool that the file system or the machine can't hold."""
    folder = os.statvfs(path.parent)
    mine = os.fstat(fd).st_blocks * 512
    free = folder.f_bavail * folder.f_frsize + mine
    limits = [(free, f"free on {path.parent}")]
    limits.append((os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "of memory here"))
    limits.append((_available_bytes() + mine, "of memory that nobody uses"))
    limit, what = min(limits)
    if pool_bytes > limit:
        if os.fstat(fd).st_size == 0:
            path.unlink(missing_ok=True)
        raise InputError(
            f"pool_bytes = {pool_bytes} is more than the {limit} bytes {what}: lower pool_bytes"
        )


def _available_bytes() -> int:
    """What the kernel would give without killing anyone (MemAvailable, proc_meminfo(5))."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) << 10
    return 1 << 62
