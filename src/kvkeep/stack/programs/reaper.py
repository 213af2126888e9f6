"""A small process between a stack and one of its processes: nothing outlives it. A program.

Run as ``python -I -S reaper.py CHANNEL_FD GRACE_S COMMAND...``. It starts COMMAND in a
session of its own, and is the parent of whatever COMMAND's descendants leave behind (Linux'
"subreaper"), in whichever session they hide. It ends them all, first politely, then by force, when

* it gets SIGTERM (its owner wants the process stopped),
* its owner's end of the channel closes (the owner died, by whatever signal), or
* COMMAND itself ended.

What ranks of an engine leave in shared memory when they are killed it removes after them.

The channel is a socket: the reaper writes ``{"pid", "start_ticks"}``, later ``{"code"}``. PDEATHSIG
alone would not do: it fires when the *thread* that started a child ends, and does not reach
grandchildren. Single-threaded; standard library only, so that it starts fast and stays small.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
ORPHAN_GRACE_S = 5.0
"""Time to end well where the owner is dead: nobody waits for the result."""
SETTLE_S = 1.0
"""Time that the command's descendants have to end well once it is gone itself."""
TRACKER_GRACE_S = 6.0
"""Time that Python's resource trackers have after that to remove what the killed left; they take
milliseconds, where the machine is not busy."""
SWEEP_S = 0.05
CHECK_OWNER_S = 1.0
"""The channel tells at once; the owner's pid is asked as well, for a fork may hold the channel."""
SHARED_MEMORY = "/dev/shm"
RANK_FILE_MARK = "-cpushm_"
LOOKS_MAX = 3
"""A file that no descendant was seen to use so often is another engine's."""


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def start_ticks(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None if there is none, or only its body.

    With the pid it names a process for good: a pid alone is given out again.
    Source: proc(5), /proc/pid/stat, fields 3 and 22.
    """
    fields = _stat(pid)
    return None if fields is None or fields[0] in ("Z", "X") else int(fields[19])


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/pid/stat from the third on: state, parent, group, session, ..."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:
            # The command in parentheses may hold anything, so count from its end.
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None


def descendants(root: int) -> Iterator[int]:
    """Every process below ``root``, bodies included."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))) is not None:
            children.setdefault(int(fields[1]), []).append(int(entry))
    found = list(children.get(root, ()))
    while found:
        pid = found.pop()
        yield pid
        found.extend(children.get(pid, ()))


def is_tracker(pid: int) -> bool:
    """Whether a process is the one that removes shared memory which Python programs leave.

    multiprocessing starts it beside a program, and it ends by itself when the last of its users
    has. Killed before, it leaves ``psm_*`` and ``sem.mp-*`` in /dev/shm for good.
    Source: CPython 3.11, Lib/multiprocessing/resource_tracker.py, ``ensure_running``.
    """
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"multiprocessing.resource_tracker" in file.read()
    except OSError:
        return False


def is_rank_file(name: str) -> bool:
    """Whether a file in shared memory is named as those through which vLLM's ranks on CPUs add up.

    Such as ``vllm_dist_<32 digits>-tp:0-[0-1]-cpushm_0``, megabytes for each thread. A rank unlinks
    them as it exits; where it is killed, nobody does.
    Source: vllm 0.32, cpu_communicator.py, ``make_group_name``, and csrc/cpu/shm.cpp.
    """
    return RANK_FILE_MARK in name and name.rpartition("_")[2].isdecimal()


class RankFiles:
    """Finds the files of ranks below this process, and removes them once those are gone.

    Their names are drawn at random by the engine, so a file counts as its own only when a
    descendant was seen to have it mapped, and goes only if it is that very file still.
    """

    def __init__(self) -> None:
        self._inodes: dict[str, int] = {}
        """Of our own, by name."""
        self._num_looks: dict[str, int] = {}

    def look(self) -> None:
        """Find what came since; a listing where nothing did. While descendants run."""
        names = [name for name in _names_in(SHARED_MEMORY) if is_rank_file(name)]
        self._num_looks = {name: self._num_looks.get(name, 0) + 1 for name in names}
        if not any(self._is_open(name) for name in names):
            return
        mapped: dict[str, int] = {}
        for pid in descendants(os.getpid()):
            mapped |= _mapped_from(pid, SHARED_MEMORY)
        self._inodes |= {name: mapped[name] for name in names if name in mapped}

    def _is_open(self, name: str) -> bool:
        return name not in self._inodes and self._num_looks[name] <= LOOKS_MAX

    def remove(self) -> None:
        """Remove what was found. Once no descendant is left."""
        for name, inode in self._inodes.items():
            path = f"{SHARED_MEMORY}/{name}"
            with contextlib.suppress(OSError):
                if os.lstat(path).st_ino == inode:
                    os.unlink(path)


def _names_in(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _mapped_from(pid: int, folder: str) -> dict[str, int]:
    """Inode by name of the files in a folder that a process has mapped.

    Source: proc(5), /proc/pid/maps: range, access, offset, device, inode, path.
    """
    found = {}
    try:
        with open(f"/proc/{pid}/maps", errors="replace") as file:
            for line in file:
                fields = line.rstrip("\n").split(None, 5)
                if len(fields) == 6 and os.path.dirname(fields[5]) == folder:
                    found[os.path.basename(fields[5])] = int(fields[4])
    except OSError:
        pass  # it ended meanwhile
    return found


class Reaper:
    """Runs one command and ends everything that came of it."""

    def __init__(self, channel: socket.socket, command: list[str]) -> None:
        """Start the command.

        Raises:
            OSError: It can't be started.
        """
        self._channel = channel
        self._owner = os.getppid()
        self._code: int | None = None
        self._stop_asked = False
        self._rank_files = RankFiles()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._ask_stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        # In a session of its own, so that a terminal's Ctrl-C reaches the owner only.
        self._child = subprocess.Popen(
            command,
            start_new_session=True,
            # There are no threads, so this is safe; it covers a SIGKILL of the reaper itself.
            preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509
        )
        self._pid = self._child.pid
        self._tell({"pid": self._pid, "start_ticks": start_ticks(self._pid)})

    def _ask_stop(self, *_: object) -> None:
        self._stop_asked = True

    def _tell(self, what: dict[str, object]) -> None:
        with contextlib.suppress(OSError):  # the owner is gone; that is seen elsewhere
            self._channel.sendall(json.dumps(what).encode() + b"\n")

    def run(self, grace_s: float) -> int:
        """Wait for one of the three reasons to end, then end everything; returns the exit code."""
        while self._code is None and not self._stop_asked:
            if self._is_owner_gone(self._wait(CHECK_OWNER_S)):
                grace_s = min(grace_s, ORPHAN_GRACE_S)
                break
            self._rank_files.look()
            self._reap()
        if self._code is None:
            self._stop(grace_s)
        self._end_rest()
        code = self._code if self._code is not None else 1
        self._tell({"code": code})
        return code

    def _wait(self, timeout_s: float) -> bool:
        """Wait for a signal or for news on the channel; True for the latter."""
        channel = self._channel.fileno()
        ready, _, _ = select.select([channel, self._wake_read], [], [], timeout_s)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        return channel in ready

    def _is_owner_gone(self, has_news: bool) -> bool:
        if has_news:
            try:
                return self._channel.recv(4096) == b""
            except ConnectionError:
                return True
        return os.getppid() != self._owner

    def _reap(self) -> None:
        """Wait for every child that ended, our own and adopted ones."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._pid:
                self._code = self._child.returncode = os.waitstatus_to_exitcode(status)

    def _stop(self, grace_s: float) -> None:
        """Ask the command to end, and wait for it."""
        self._rank_files.look()
        for number in (signal.SIGTERM, signal.SIGCONT):  # a frozen process hears no SIGTERM
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)
        end_s = time.perf_counter() + grace_s
        while self._code is None and (left_s := end_s - time.perf_counter()) > 0:
            self._wait_quietly(min(left_s, CHECK_OWNER_S))
            self._reap()

    def _wait_quietly(self, timeout_s: float) -> None:
        select.select([self._wake_read], [], [], timeout_s)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)

    def _end_rest(self) -> None:
        """End whatever is left: politely, then by force, and those that tidy up last."""
        self._signal_until(signal.SIGTERM, SETTLE_S, trackers=False)
        self._signal_until(signal.SIGKILL, TRACKER_GRACE_S, trackers=False)
        self._signal_until(signal.SIGKILL, None, trackers=True)
        self._rank_files.remove()

    def _signal_until(self, number: int, limit_s: float | None, *, trackers: bool) -> None:
        """Send a signal again and again, for they may fork, until none is left or time is up."""
        end_s = None if limit_s is None else time.perf_counter() + limit_s
        asked: set[int] = set()
        while True:
            self._reap()
            left = list(descendants(os.getpid()))
            if not left or (end_s is not None and time.perf_counter() > end_s):
                return
            for pid in left:
                if pid in asked and number != signal.SIGKILL:
                    continue
                if trackers or not is_tracker(pid):
                    asked.add(pid)
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, number)
            self._wait_quietly(SWEEP_S)


def main() -> None:
    """Run what the command line says."""
    if len(sys.argv) < 4:
        sys.exit("usage: reaper.py CHANNEL_FD GRACE_S COMMAND...")
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        channel.set_inheritable(False)
        try:
            reaper = Reaper(channel, sys.argv[3:])
        except OSError as error:
            text = f"{sys.argv[3]} can't be started: {error.strerror}"
            channel.sendall(json.dumps({"error": text}).encode() + b"\n")
            sys.exit(127)
        code = reaper.run(float(sys.argv[2]))
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
