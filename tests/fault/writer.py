"""A worker in a process of its own that can be stopped in the midst of a copy.

    python -m tests.fault.writer SOCKET NUM_BLOCKS LEASE_S

Reserves blocks, copies the first of them, and says so. When told, it copies all of them, commits,
and says what became of that. It ends with its standard input.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvkeep.model.errors import UnavailableError
from kvkeep.protocol.codec import split_slots
from tests.integration.daemons import CALL_TIMEOUT_S, Daemon, Worker, hashes_of
from tests.waiting import HANG_S

ROOT = Path(__file__).parents[2]
FIRST = 700_000
"""Its blocks are numbered from here."""


class Writer:
    """The process, seen from a test."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.pid = process.pid

    def hear(self) -> Any:
        """What it says next."""
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], HANG_S)
        assert readable, "the writer says nothing"
        return json.loads(self._process.stdout.readline())

    def tell(self, word: str) -> None:
        """Tell it to go on."""
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it without warning, and wait until the kernel has forgotten it."""
        self._process.kill()
        self._process.communicate(timeout=HANG_S)


@contextlib.contextmanager
def running_writer(daemon: Daemon, num_blocks: int, lease_s: float) -> Iterator[Writer]:
    """A writer's process; ended afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fault.writer", daemon.socket, str(num_blocks), str(lease_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    writer = Writer(process)
    try:
        yield writer
    finally:
        if process.poll() is None:
            writer.kill()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()


def main(socket: str, num_blocks: int, lease_s: float) -> None:
    """Write; see the module."""
    hashes = hashes_of(FIRST, num_blocks)
    daemon: Any = SimpleNamespace(socket=socket)
    worker = Worker(daemon, engine_id="writer")
    reserved = worker.reserve(hashes, lease_s)
    slots = split_slots(reserved.slots)
    worker.copy(hashes[:1], slots[:1])
    say({"slots": slots})
    for _ in sys.stdin:
        worker.copy(hashes, slots)
        try:
            committed = worker.commit(reserved)
            say({"num_ready": committed.num_ready, "is_fenced": committed.is_fenced})
        except UnavailableError:
            worker.close()
            worker = Worker(daemon, engine_id="writer")
            say({"timeout_s": CALL_TIMEOUT_S})


def say(what: object) -> None:
    """One line on standard output."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
