"""Engines named by a file that may change while the router runs.

The file is looked at again and again rather than watched by the kernel: it may lie on a network
folder or be a link that a container platform exchanges, where notifications don't come.
"""

import asyncio
import logging
import stat
from collections.abc import Callable
from pathlib import Path

from kvkeep.model.errors import InputError
from kvkeep.router.membership.member import Member, parse_members

log = logging.getLogger(__name__)

FILE_BYTES_MAX = 4 << 20

_Signature = tuple[int, int, int]


class FileSource:
    """A file of engines; what was last found good is what counts."""

    def __init__(self, path: Path, found: Callable[[list[Member]], None]) -> None:
        """Know the path; ``found`` is called with all engines whenever they change."""
        self._path, self._found = path, found
        self._read: _Signature | None = None
        self._seen: _Signature | None = None
        self._complaint = ""
        self.num_errors = 0
        """How often the file turned bad, or bad in another way."""

    @property
    def is_good(self) -> bool:
        """Whether the engines that count are those the file names now."""
        return not self._complaint

    def load(self) -> None:
        """Read the file at the start.

        Raises:
            InputError: It can't be read or is wrong.
        """
        signature = self._signature()
        members = parse_members(self._text(), str(self._path))
        self._read = self._seen = signature
        self._found(members)

    def look(self) -> None:
        """Read the file again if it has changed; a bad one changes nothing and is told once."""
        try:
            signature = self._signature()
        except InputError as error:
            self._read = self._seen = None
            self._complain(str(error))
            return
        if signature == self._read:
            return
        if signature != self._seen:
            # It may be half written: what stays the same until the next look is whole.
            self._seen = signature
            return
        self._read = signature
        try:
            members = parse_members(self._text(), str(self._path))
        except InputError as error:
            self._complain(str(error))
            return
        self._complaint = ""
        self._found(members)

    async def run(self, poll_s: float) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(poll_s)
            self.look()

    def _complain(self, complaint: str) -> None:
        if complaint == self._complaint:
            return
        self._complaint = complaint
        self.num_errors += 1
        log.warning("the last good list of engines stays. reason=%s", complaint)

    def _signature(self) -> _Signature:
        try:
            found = self._path.stat()
        except OSError as error:
            raise InputError(f"{self._path} can't be read: {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{self._path} is not a file: name a list of engines")
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _text(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                text = file.read(FILE_BYTES_MAX + 1)
        except OSError as error:
            raise InputError(f"{self._path} can't be read: {error.strerror}") from error
        if len(text) > FILE_BYTES_MAX:
            raise InputError(f"{self._path} is larger than {FILE_BYTES_MAX} bytes")
        return text
