"""What runs, written down in the stack's state folder for other processes to read and to end.

One process, the stack's supervisor, writes ``stack.json`` while it holds the folder's lock;
whoever gets the lock knows that the supervisor is gone, and may clear what it left.
"""

import contextlib
import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import platformdirs

from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.stack.process import REAPER_SPARE_S, STOP_GRACE_S, ProcessId, end_session
from kvkeep.tiers.pool_inode import FILE_MAGIC

RECORD_NAME = "stack.json"
LOCK_NAME = "stack.lock"
POLL_S = 0.05
PROBE_S = 1.0
APPEAR_S = 5.0
"""Time that a `kvkeep up` which was started together with a `kvkeep wait` has to show itself."""
DOWN_TIMEOUT_S = 2 * (STOP_GRACE_S + REAPER_SPARE_S) + 10.0
"""Engines end at once, then the daemon; each may take its whole grace."""

State = Literal["starting", "ready", "stopping", "failed"]


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A process that the stack started."""

    name: str
    process: ProcessId
    reaper: ProcessId
    log: str


class DaemonRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Where the daemon is."""

    socket: str
    """Its control socket, once it has announced it; else empty: the path may be another's."""
    metrics_url: str
    pool: str
    """The pool that goes with the stack; empty for one that is not the stack's to remove."""
    keep_pool: bool


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Where an engine is."""

    name: str
    url: str
    pid: int | None
    """None for an engine that ran already, and for one that nobody has asked for yet."""
    model: str = ""
    """Name that its clients ask for, where that is not the stack's."""
    on_demand: bool = False
    """Whether it runs only while it is asked for."""


class RouterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Where the router is."""

    url: str
    """OpenAI-compatible address for clients; empty until it listens."""
    admin_url: str
    """Metrics, workers, explanations."""


class StackRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One stack as it is now."""

    name: str
    state: State
    supervisor: ProcessId
    model: str
    """Name that clients ask for."""
    error: str = ""
    """Why it failed, as a sentence."""
    doing: dict[str, str] = {}
    """What each process is doing while the stack starts."""
    daemon: DaemonRecord | None = None
    engines: list[EngineRecord] = []
    router: RouterRecord | None = None
    drain_s: float = 0.0
    """How long its requests may still run when it is told to stop, in seconds."""
    processes: list[ProcessRecord] = []
    """In the order of their start."""
    sockets: list[str] = []
    """What servers of tiers make outside the state folder, and leave when they are killed."""


def write_record(folder: Path, record: StackRecord) -> None:
    """Replace the record at once: a reader sees the old one or the new one."""
    path = folder / RECORD_NAME
    partial = path.with_suffix(".partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
    partial.rename(path)


def read_record(folder: Path) -> StackRecord | None:
    """What was written last; None where nothing was, or another version's."""
    try:
        return msgspec.json.decode((folder / RECORD_NAME).read_bytes(), type=StackRecord)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def note_folder(name: str, folder: Path) -> None:
    """Leave word where the stack of this name keeps its state, for who knows its name alone.

    Of two stacks of one name the latest counts. Where no note can be left, the stack is found by
    its file.
    """
    note = _note_of(name)
    partial = note.with_name(f"{name}.{os.getpid()}.partial")
    with contextlib.suppress(OSError):
        note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial.write_text(str(folder))
        partial.rename(note)


def noted_folder(name: str) -> Path | None:
    """Where the stack of this name is, or was until it crashed; None if nobody left word."""
    try:
        folder = Path(_note_of(name).read_text())
    except (OSError, ValueError):
        return None
    record = read_record(folder)
    return folder if record is not None and record.name == name else None


def _forget_folder(name: str, folder: Path) -> None:
    note = _note_of(name)
    with contextlib.suppress(OSError, ValueError):
        if note.read_text() == str(folder):
            _remove(note)


def _note_of(name: str) -> Path:
    return Path(platformdirs.user_state_dir("kvkeep")) / "places" / name


class FolderLock:
    """Held by the one supervisor of a state folder; also a context manager."""

    def __init__(self, file: int) -> None:
        self._file: int | None = file

    @staticmethod
    def taken(folder: Path, *, wait_s: float = 0.0) -> "FolderLock":
        """Take the lock, waiting at most ``wait_s`` seconds.

        Raises:
            InputError: Another process has it, or the folder can't be made.
        """
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InputError(
                f"The state folder {folder} can't be used ({error.strerror}): "
                "choose another state_dir."
            ) from error
        clock = SystemClock()
        end_s = clock.now_s() + wait_s
        while not _try_lock(file):
            if clock.now_s() >= end_s:
                os.close(file)
                raise InputError(_in_use(folder))
            time.sleep(POLL_S)
        return FolderLock(file)

    def give_back(self) -> None:
        """Let another process have it. Idempotent."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _in_use(folder: Path) -> str:
    record = read_record(folder)
    if record is None:
        return f"Another kvkeep uses {folder}: wait for it, or choose another state_dir."
    return (
        f"The stack {record.name} is up already (process {record.supervisor.pid}): "
        f"`kvkeep down {record.name}` stops it."
    )


def clear(folder: Path) -> list[str]:
    """End and remove what a stack left whose supervisor is gone. The caller holds the lock.

    See `clear_recorded`; without a record there is nothing to clear.
    """
    record = read_record(folder)
    return [] if record is None else clear_recorded(folder, record)


def clear_recorded(folder: Path, record: StackRecord) -> list[str]:
    """End what a record names and still runs, and remove its files and the record itself.

    A pid that belongs to another process by now is left alone. A file that can't be removed is
    named on stderr: it must not keep the next stack from its folder.

    Returns:
        Names of the processes of which something still ran.
    """
    ended = [entry.name for entry in reversed(record.processes) if _end(entry)]
    if record.daemon is not None:
        _remove_files(record.daemon)
    for path in map(Path, record.sockets):
        if _is_socket(path) and not _is_answered(path):
            _remove(path)
    now = read_record(folder)
    if now is None or now.supervisor == record.supervisor:  # not one that came after it
        _remove(folder / RECORD_NAME)
        _forget_folder(record.name, folder)
    return ended


def _remove_files(daemon: DaemonRecord) -> None:
    """Remove a dead daemon's socket and pool; a living one, not ours, holds locks on them.

    A path alone proves nothing: what lies there now may be a file of the user's, so it goes only
    if it is a socket, or begins as pools do.
    """
    control, pool = Path(daemon.socket), Path(daemon.pool)
    if daemon.socket and _is_socket(control) and not _is_locked(Path(f"{control}.lock")):
        _remove(control)
    if daemon.pool and not daemon.keep_pool and is_pool(pool) and not _is_locked(pool):
        _remove(pool)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except NotADirectoryError:
        return  # nothing is there
    except OSError as error:
        print(f"kvkeep: {path} can't be removed ({error.strerror})", file=sys.stderr, flush=True)


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.lstat().st_mode)
    except OSError:
        return False


def _is_answered(path: Path) -> bool:
    """Whether a program listens at a socket; another may have been given its name since."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PROBE_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True


def is_pool(path: Path) -> bool:
    """Whether a regular file, not a link to one, begins as a pool does; False if unreadable."""
    magic = FILE_MAGIC.rstrip(b"\0")
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False


def _is_locked(path: Path) -> bool:
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return not _try_lock(file)
    finally:
        os.close(file)


def _end(entry: ProcessRecord) -> bool:
    """End one process with all it started: by its reaper, or without where that is gone too.

    Returns:
        Whether anything of it still ran.
    """
    has_run = entry.process.is_alive() or entry.reaper.is_alive()
    if entry.reaper.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(entry.reaper.pid, signal.SIGTERM)
            if not wait_for_end(entry.reaper, STOP_GRACE_S + REAPER_SPARE_S):
                os.kill(entry.reaper.pid, signal.SIGKILL)
    return bool(end_session(entry.process)) or has_run


def wait_for_end(process: ProcessId, timeout_s: float) -> bool:
    """Wait until a process is gone; False if it is not."""
    clock = SystemClock()
    end_s = clock.now_s() + timeout_s
    while process.is_alive():
        if clock.now_s() > end_s:
            return False
        time.sleep(POLL_S)
    return True


def bring_down(folder: Path) -> list[str]:
    """Stop the stack of a state folder, whoever runs it, and clear what crashed ones left.

    Idempotent: without a stack nothing happens.

    Returns:
        Names of what was stopped, in the order of their stop.

    Raises:
        UnavailableError: It would not stop; ``kvkeep down`` may be run again.
    """
    record = read_record(folder)
    if record is None and not os.path.exists(folder / LOCK_NAME):
        return []
    running = []
    if record is not None:
        running = [entry.name for entry in reversed(record.processes) if entry.process.is_alive()]
        _stop_supervisor(record.supervisor, DOWN_TIMEOUT_S + record.drain_s)
    try:
        with FolderLock.taken(folder, wait_s=DOWN_TIMEOUT_S):
            return list(dict.fromkeys([*running, *clear(folder)]))
    except InputError as error:
        raise UnavailableError(f"The stack would not stop: {error}") from error


def _stop_supervisor(supervisor: ProcessId, timeout_s: float) -> None:
    if not supervisor.is_alive() or supervisor.pid == os.getpid():
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(supervisor.pid, signal.SIGTERM)
        os.kill(supervisor.pid, signal.SIGCONT)
        if not wait_for_end(supervisor, timeout_s):
            os.kill(supervisor.pid, signal.SIGKILL)


def await_record(
    folder: Path,
    timeout_s: float,
    *,
    supervisor: subprocess.Popen[bytes] | None = None,
    said: Callable[[str], object] = lambda doing: None,
) -> StackRecord:
    """Wait until the stack of a state folder is ready.

    Args:
        folder: State folder.
        timeout_s: Longest wait, in seconds.
        supervisor: The child whose record counts; without, anybody's does, and there must be one
            within ``APPEAR_S``.
        said: Told what the stack does, when that changes.

    Raises:
        UnavailableError: It failed, ended, or was not ready in time.
    """
    clock = SystemClock()
    begun_s = clock.now_s()
    doing = ""
    while True:
        record = read_record(folder)
        if record is not None and supervisor is not None:
            record = record if record.supervisor.pid == supervisor.pid else None
        if record is not None and record.state == "ready" and record.supervisor.is_alive():
            return record
        waited_s = clock.now_s() - begun_s
        # What is there at first may be an earlier run's: the next one is given time to show.
        if supervisor is not None or waited_s >= APPEAR_S:
            _require_hope(folder, record, supervisor)
        if waited_s > timeout_s:
            raise UnavailableError(f"The stack was not ready after {timeout_s:g} s: {doing}.")
        now = ", ".join(f"{name} {what}" for name, what in record.doing.items()) if record else ""
        if now and now != doing:
            doing = now
            said(doing)
        time.sleep(POLL_S)


def _require_hope(
    folder: Path, record: StackRecord | None, supervisor: subprocess.Popen[bytes] | None
) -> None:
    """Refuse to wait where nobody will make the stack ready.

    Raises:
        UnavailableError: The reason; empty where the supervisor ended without a record.
    """
    if supervisor is None:
        require_alive(folder, record)
    elif record is not None and record.state == "failed":
        raise UnavailableError(_why_failed(record))
    elif supervisor.poll() is not None:
        raise UnavailableError("")


def require_alive(folder: Path, record: StackRecord | None) -> StackRecord:
    """The record of a stack whose supervisor runs.

    Raises:
        UnavailableError: There is none; the reason and what to do.
    """
    if record is None:
        raise UnavailableError(
            f"No stack is up or starting in {folder}: start it with `kvkeep up`."
        )
    if record.state == "failed":
        raise UnavailableError(_why_failed(record))
    if not record.supervisor.is_alive():
        raise UnavailableError(
            f"The stack {record.name} crashed: its supervisor is gone; `kvkeep down {record.name}` "
            "clears what it left."
        )
    return record


def require_ready(folder: Path) -> StackRecord:
    """The record of a stack that is ready now.

    Raises:
        UnavailableError: It is not; the reason and what to do.
    """
    record = require_alive(folder, read_record(folder))
    if record.state != "ready":
        raise UnavailableError(
            f"The stack {record.name} is {record.state}: `kvkeep wait {record.name}` waits for it."
        )
    return record


def _why_failed(record: StackRecord) -> str:
    return record.error or f"The stack {record.name} failed, and nothing says why: see its logs."
