"""A daemon whose disk does what a file says: nothing, an error, slowness, or standing still.

    python -m tests.fault.shimmed_daemon FILE ARGUMENTS-OF-KVKEEP-DAEMON

The file holds ``EIO`` or the like, ``slow`` or ``hang``, or is not there; it is looked at whenever
values move, which the disk tier alone does with ``os.preadv`` and ``os.pwritev``.
"""

import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PAUSE_S = 0.02
"""Of a disk that hangs, between looks at the file; what a slow one needs for each value."""


class Shim:
    """Stands before the two calls that move values."""

    def __init__(self, said: Path) -> None:
        self._said = said
        for name in ("preadv", "pwritev"):
            setattr(os, name, self._failing(getattr(os, name)))

    def _word(self) -> str:
        try:
            return self._said.read_text()
        except FileNotFoundError:
            return ""

    def _failing(self, whole: Callable[..., int]) -> Callable[..., int]:
        def call(fd: int, views: Sequence[memoryview], offset: int) -> int:
            while (word := self._word()) == "hang":
                time.sleep(PAUSE_S)
            if word == "slow":
                time.sleep(PAUSE_S)
            elif word:
                number = getattr(errno, word)
                raise OSError(number, os.strerror(number))
            return whole(fd, views, offset)

        return call


def main(said: str, *arguments: str) -> None:
    """Run the daemon."""
    Shim(Path(said))
    from kvkeep.cli.main import main as run

    run(["daemon", *arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])
