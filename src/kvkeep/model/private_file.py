"""Reading a file that holds a secret: nobody else may touch it."""

import os
import stat
from pathlib import Path

from kvkeep.model.errors import InputError


def read_private(path: Path, what: str, bytes_max: int) -> bytes:
    """Read a file of this user or root that only its owner may read or write.

    Args:
        path: Of the file.
        what: What to call it in a refusal, such as ``key file``.
        bytes_max: Bytes that it may have.

    Returns:
        The whole file, or its first ``bytes_max + 1`` bytes if it has more: the caller says so.

    Raises:
        InputError: It can't be opened or read, is no file, or is open to others.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InputError(
            f"the {what} {path} can't be opened ({error.strerror}): name another"
        ) from error
    try:
        # Of what was opened, not of what the path names by now.
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"the {what} {path} is not a file: name another")
        if found.st_uid not in (0, os.getuid()) or stat.S_IMODE(found.st_mode) & 0o177:
            raise InputError(f"the {what} {path} is open to others: own it and run chmod 600 on it")
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read(bytes_max + 1)
    except OSError as error:
        raise InputError(f"the {what} {path} can't be read ({error.strerror})") from error
    finally:
        os.close(fd)
