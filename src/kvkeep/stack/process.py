"""One process of a stack: started under a reaper, watched, stopped.

Blocking; one thread at a time may use an object. Which processes exist is written down in the
stack's record (`kvkeep.stack.record`), so that another process can end them.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import UnavailableError
from kvkeep.stack.programs.reaper import TRACKER_GRACE_S, is_tracker, start_ticks

STOP_GRACE_S = 15.0
"""Time a process has to end after SIGTERM before it is killed."""
REAPER_SPARE_S = 10.0
"""Time the reaper has beyond that; killing and waiting takes milliseconds."""
REAPER_START_S = 30.0
"""Longest wait for a reaper's first word, on a machine that swaps."""
LOG_TAIL_BYTES = 256 << 10
POLL_S = 0.05

_FAULT = re.compile(r"\b([A-Za-z_.]*(?:Error|Exception|Interrupt))\b: (.+)")
_IS_NO_FAULT = re.compile(r"\b(DEBUG|INFO|WARNING)\b|Warning:")
"""A warning may quote an error that it only fears."""
_SAYS_NOTHING = re.compile(r"Engine core initialization failed|WorkerProc initialization failed")
"""What vLLM says last names no cause (vllm 0.32, v1/engine/utils.py)."""


class ProcessId(msgspec.Struct, frozen=True):
    """A process, told from a later one that was given the same pid."""

    pid: int
    start_ticks: int
    """When it began, in clock ticks since boot (field 22 of /proc/pid/stat)."""

    def is_alive(self) -> bool:
        """Whether this very process runs still."""
        return start_ticks(self.pid) == self.start_ticks


def this_process() -> ProcessId:
    """The caller."""
    return ProcessId(os.getpid(), start_ticks(os.getpid()) or 0)


class StackProcess:
    """A process that ends when it is told, when its owner ends, and with all it started."""

    def __init__(self, name: str, log: Path, *, stop_grace_s: float = STOP_GRACE_S) -> None:
        """Name a process and where its output goes; nothing runs yet.

        Args:
            name: For a person.
            log: Output is added to it.
            stop_grace_s: Time it has to end after SIGTERM, in seconds.
        """
        self.name, self.log = name, log
        self._stop_grace_s = stop_grace_s
        self._reaper: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._id: ProcessId | None = None
        self._log_start = 0

    def start(
        self, command: Sequence[str], *, environment: Mapping[str, str], folder: Path
    ) -> ProcessId:
        """Start the command in ``folder``; its output is added to the log.

        Raises:
            UnavailableError: It can't be started; nothing runs.
        """
        assert self._reaper is None, f"{self.name} runs already"
        try:
            self._start_reaper(command, environment, folder)
        except OSError as error:
            raise UnavailableError(
                f"{self.name} can't be started: {error.strerror} ({error.filename or folder})."
            ) from error
        self._id = self._hear_id()
        return self._id

    def _start_reaper(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path
    ) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        mine, theirs = socket.socketpair()
        with contextlib.ExitStack() as undone, theirs, self.log.open("ab") as log:
            undone.enter_context(mine)
            self._log_start = log.tell()
            self._reaper = subprocess.Popen(
                reaper_command(theirs.fileno(), self._stop_grace_s, command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=dict(environment),
                umask=0o077,  # what it makes anywhere is its user's alone
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
            undone.pop_all()
        self._channel = mine

    def _hear_id(self) -> ProcessId:
        assert self._channel is not None
        self._channel.settimeout(REAPER_START_S)
        try:
            with self._channel.makefile("rb") as lines:
                line = lines.readline()
            said: dict[str, Any] = (
                json.loads(line) if line else {"error": "its reaper ended at once"}
            )
        except (TimeoutError, ConnectionError) as error:
            said = {"error": f"its reaper is silent ({error})"}
        if "error" in said:
            self.stop()
            raise UnavailableError(f"{self.name} can't be started: {said['error']}.")
        return ProcessId(said["pid"], said["start_ticks"] or 0)

    @property
    def id(self) -> ProcessId | None:
        """The process itself, not its reaper; None before the first start."""
        return self._id

    @property
    def pid(self) -> int:
        """Its pid, also after its end."""
        assert self._id is not None, f"{self.name} was never started"
        return self._id.pid

    @property
    def reaper_id(self) -> ProcessId | None:
        """The process that watches it."""
        if self._reaper is None:
            return None
        return ProcessId(self._reaper.pid, start_ticks(self._reaper.pid) or 0)

    def is_running(self) -> bool:
        """Whether the process runs."""
        return self._id is not None and self._id.is_alive()

    def send_signal(self, number: int) -> None:
        """Send a signal to the process itself, if it runs."""
        if self._id is not None and self._id.is_alive():
            os.kill(self._id.pid, number)

    def kill(self) -> None:
        """End it with SIGKILL, and wait until all it started is gone too."""
        self.send_signal(signal.SIGKILL)
        self._wait(REAPER_SPARE_S)

    def stop(self) -> None:
        """End it and all it started: SIGTERM, and SIGKILL after its grace. Idempotent."""
        self.ask_stop()
        self._wait(self._stop_grace_s + REAPER_SPARE_S)

    def ask_stop(self) -> None:
        """Begin to stop it; `stop` waits for the end."""
        if self._reaper is not None and self._reaper.poll() is None:
            self._reaper.terminate()

    def is_gone(self) -> bool:
        """Whether nothing of it runs, its reaper neither: `stop` returns at once then."""
        return self._reaper is None or self._reaper.poll() is not None

    def _wait(self, timeout_s: float) -> None:
        if self._reaper is None:
            return
        try:
            self._reaper.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._reaper.kill()
            self._reaper.wait()
            end_session(self._id)
        if self._channel is not None:
            self._channel.close()
        self._reaper = self._channel = None

    def new_output(self) -> bytes:
        """What it wrote since its start, the last ``LOG_TAIL_BYTES``; empty if the log is gone."""
        try:
            with self.log.open("rb") as log:
                return _tail(log, self._log_start)
        except OSError:
            return b""

    def why_failed(self) -> str:
        """The most telling thing it wrote, and where the rest is."""
        return f"{telling_line(self.new_output().decode(errors='replace'))} (log: {self.log})"


def reaper_command(channel: int, grace_s: float, command: Sequence[str]) -> list[str]:
    """A command under a reaper, which ends it with all it started when its owner ends.

    Args:
        channel: Descriptor of a socket; it is told there what was started, or why nothing was, and
            takes its closing for the owner's end.
        grace_s: Time that the command has after SIGTERM.
        command: Program and arguments.
    """
    # Isolated and without site: it needs the standard library only, and starts in half the time.
    program = str(Path(__file__).parent / "programs" / "reaper.py")
    return [sys.executable, "-I", "-S", program, str(channel), str(grace_s), *command]


def _tail(log: BinaryIO, start: int) -> bytes:
    end = log.seek(0, os.SEEK_END)
    log.seek(max(start, end - LOG_TAIL_BYTES))
    return log.read()


def telling_line(text: str) -> str:
    """The line of a log that best says what went wrong.

    The first error names the cause; what follows it only reports that something failed. Without
    any, the last line has to do.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if not _IS_NO_FAULT.search(line)]
    faults = [match for line in told if (match := _FAULT.search(line))]
    for match in faults:
        if not _SAYS_NOTHING.search(match[2]):
            return f"{match[1]}: {match[2]}"[:400]
    return lines[-1][:400] if lines else "it wrote nothing"


def end_session(leader: ProcessId | None) -> list[int]:
    """Kill what is left of the session that a process led; for when its reaper was killed.

    A session's id is not given out again as a pid while a process of it lives, so members
    without their leader are still ours; a leader that began at another time is a stranger.

    Returns:
        Pids of what was killed.
    """
    if leader is None or start_ticks(leader.pid) not in (None, leader.start_ticks):
        return []
    clock = SystemClock()
    end_s = clock.now_s() + REAPER_SPARE_S
    trackers_end_s = clock.now_s() + TRACKER_GRACE_S
    killed: dict[int, None] = {}
    while (members := list(_session_members(leader))) and clock.now_s() < end_s:
        for pid in members:
            # Once its users are gone a tracker removes what they left in shared memory, and ends.
            if is_tracker(pid) and clock.now_s() < trackers_end_s:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed[pid] = None
        time.sleep(POLL_S)
    return list(killed)


def _session_members(leader: ProcessId) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            fields = (
                Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(")")[2].split()
            )
        except OSError:
            continue
        is_body = fields[0] in ("Z", "X")
        if not is_body and int(fields[3]) == leader.pid and int(fields[19]) >= leader.start_ticks:
            found.append(int(entry))
    return found
