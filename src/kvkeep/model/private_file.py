"""Reading a file that holds a secret: nobody else may touch it."""

import os
import stat
from pathlib import Path

from kvkeep.model.errors import InputError

KEY_CHARS_MIN = 16
"""Of a key that people send; shorter ones can be guessed."""
SECRET_FILE_BYTES_MAX = 1 << 16


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
    except ValueError as error:
        raise InputError(
            f"the {what} {str(path)!r} can't be: a path holds no zero byte; name another"
        ) from error
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


def read_private_whole(path: Path, what: str, bytes_max: int) -> bytes:
    """Read such a file, all of it.

    Raises:
        InputError: It can't be had, is open to others, or has more than ``bytes_max`` bytes.
    """
    text = read_private(path, what, bytes_max)
    if len(text) > bytes_max:
        raise InputError(f"the {what} {path} has more than {bytes_max} bytes")
    return text


def read_secret(path: Path, what: str) -> bytes:
    """The one key that a file holds, on a line of its own.

    Raises:
        InputError: It can't be read, is open to others, or is too short to be a secret.
    """
    secret = read_private_whole(path, what, SECRET_FILE_BYTES_MAX).strip()
    if len(secret) < KEY_CHARS_MIN or len(secret.split()) != 1 or not secret.isascii():
        raise InputError(
            f"the {what} {path} must hold one key of {KEY_CHARS_MIN} characters or more, ASCII "
            "without spaces: make one with openssl rand -hex 24"
        )
    return secret
