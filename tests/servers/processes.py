"""A server in a process of its own: started, asked until ready, frozen, killed, stopped by pid."""

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.waiting import HANG_S

START_TIMEOUT_S = 90.0
POLITE_S = 10.0
"""So long a server may take to end by itself, before it is killed."""


PORTS = range(20_000, 32_000)
"""Below those that the kernel gives to connections (``ip_local_port_range``): between the choice of
a port and the start of its server no connection happens to take it."""
SHARE = 200
"""Ports of one process, so that test runs beside each other choose others."""
_number = itertools.count()


def free_port() -> int:
    """A loopback port that nobody has, and that this process was not given lately."""
    first = PORTS[os.getpid() % (len(PORTS) // SHARE) * SHARE]
    for _ in range(SHARE):
        port = first + next(_number) % SHARE
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError(f"no port from {first} to {first + SHARE - 1} is free")


class ServerProcess:
    """One server and its folder; may die and be started again with the same command."""

    def __init__(self, what: str, within: Sequence[str] = ()) -> None:
        self.what = what
        self._within = within
        """In front of every command, such as ``ip netns exec NAME``."""
        self.folder = Path(tempfile.mkdtemp(prefix=f"kvkeep-test-{what}-"))
        self.log = self.folder / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str], is_ready: Callable[[], bool]) -> None:
        """Start, and ask until it is ready."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._within, *command],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        pause = threading.Event()
        begun_s = time.perf_counter()
        try:
            while not is_ready():
                assert self.process.poll() is None, f"{self.what} ended: {self._tail()}"
                assert time.perf_counter() - begun_s < START_TIMEOUT_S, (
                    f"{self.what} is not ready after {START_TIMEOUT_S} s: {self._tail()}"
                )
                pause.wait(0.02)
        except BaseException:
            self.kill()
            raise

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def freeze(self) -> None:
        """Let it stand still, and wait until each of its threads does."""
        self._signal(signal.SIGSTOP)
        begun_s = time.perf_counter()
        pause = threading.Event()
        while self._states() != {"T"}:
            assert time.perf_counter() - begun_s < HANG_S, f"{self.what} does not stop"
            pause.wait(0.01)

    def _states(self) -> set[str]:
        assert self.process is not None
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return {(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks}

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it without warning."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(HANG_S)
            self.process = None

    def stop(self) -> None:
        """End it, and take its folder away."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.thaw()
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(POLITE_S)
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
