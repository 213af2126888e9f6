"""A daemon from its settings to its end."""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import resource
import signal
import socket
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import uvloop
from aiohttp import web

from kvkeep.core import events as on
from kvkeep.core.eviction.base import EvictionPolicy
from kvkeep.core.eviction.lru import LruPolicy
from kvkeep.core.eviction.s3fifo import S3FifoPolicy
from kvkeep.daemon.http import HOST, make_application
from kvkeep.daemon.local_socket import is_served
from kvkeep.daemon.metrics import Metrics
from kvkeep.daemon.movement.movement import Movement
from kvkeep.daemon.movement.opening import judge_tiers
from kvkeep.daemon.recovery import recover
from kvkeep.daemon.sequences.listener import SequenceListener
from kvkeep.daemon.server import Server, SessionProtocol
from kvkeep.daemon.settings import DaemonSettings, runtime_folder
from kvkeep.daemon.shell import Shell
from kvkeep.model.clock import Clock, SystemClock
from kvkeep.model.errors import InputError, InvariantError, RefusedError, UnavailableError
from kvkeep.tiers.shared_memory import PoolFile

if TYPE_CHECKING:
    from kvkeep.daemon.announcer import Announcer

log = logging.getLogger(__name__)

TICK_S = 0.25
"""How often leases are looked at; a lease ends at most this much late."""
OPEN_S = 3.0
"""A daemon that takes over a pool waits so long for its tiers before it says that it is ready."""
BACKLOG = 256
"""Connections that wait to be accepted: every engine of a host may come back at once."""
SPARE_FILES = 256
"""Descriptors beside those of the sessions: HTTP, watched processes, the pool, the logs."""


class Listeners(NamedTuple):
    """The TCP ports, taken before the pool, so that a port in use costs nothing."""

    http: socket.socket
    sequences: SequenceListener | None


class Ticks(Protocol):
    """Who wants to be told several times a second that time passes."""

    def tick(self) -> None:
        """Time has passed."""
        ...


def run(settings: DaemonSettings) -> None:
    """Serve until SIGTERM or SIGINT; the pool's blocks stay for the next daemon.

    Raises:
        InputError: A setting can't be had; nothing was left behind.
        RefusedError: The socket or the pool belongs to another daemon.
        InvariantError: The daemon contradicted itself and stopped; its blocks are on trial again
            when it is started anew.
    """
    if not __debug__:
        raise InputError("kvkeep needs its assertions: start Python without -O")
    judge_tiers(settings.named_tiers)
    _allow_files(settings.sessions_max)
    path = Path(settings.socket_path)
    with contextlib.ExitStack() as stack:
        # What can be refused for little comes before what takes memory.
        stack.callback(os.close, _lock_socket(path))
        http = stack.enter_context(_bind_http(settings.metrics_port))
        sequences = None if settings.sequences is None else SequenceListener(settings.sequences)
        if sequences is not None:
            stack.callback(sequences.release)
        listeners = Listeners(http, sequences)
        pool = PoolFile.open(settings.pool_path, settings.pool_bytes)
        path.unlink(missing_ok=True)
        stack.callback(path.unlink, missing_ok=True)
        failures: list[BaseException] = []
        is_hanging = uvloop.run(_serve(settings, pool, listeners, failures))
    for failure in failures:
        if isinstance(failure, UnavailableError):
            raise failure
        raise InvariantError("kvkeep contradicted itself: start the daemon again") from failure
    if is_hanging:
        # Python would wait for threads of a tier's client, as long as their calls hang.
        logging.shutdown()
        os._exit(0)


def _allow_files(sessions_max: int) -> None:
    """Raise the limit on open files as far as this user may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * sessions_max + SPARE_FILES
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise InputError(
            f"sessions_max = {sessions_max} needs {wanted} open files and this user may have "
            f"{hard}: lower sessions_max, or raise the limit (ulimit -n)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def _lock_socket(path: Path) -> int:
    """Own the socket's path, on which nobody may listen.

    The lock file stays: were it removed, two daemons could each lock a file of that name. Others
    remove it all the same (whoever tidies temporary folders), so the socket is tried as well.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(path.parent)
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise InputError(
            f"the socket {path} can't be had ({error.strerror}): choose another socket"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise RefusedError(
            f"another daemon serves the socket {path}: stop it, or choose another socket"
        ) from error
    if path.is_symlink() or (path.exists() and not path.is_socket()):
        os.close(lock)
        raise InputError(f"{path} exists and is not a socket: choose another socket")
    if is_served(path):
        os.close(lock)
        raise RefusedError(
            f"another daemon serves the socket {path}: stop it, or choose another socket"
        )
    return lock


def _check_private(folder: Path) -> None:
    """Refuse the default folder if somebody else made it first, as anyone can in /tmp."""
    found = folder.lstat()
    is_mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if folder == runtime_folder() and (not is_mine or found.st_mode & 0o077):
        raise InputError(
            f"{folder} is not a private folder of this user: remove it, or choose another socket"
        )


def _bind_http(port: int) -> socket.socket:
    """Take the port of metrics."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((HOST, port))
        # Two sockets may be bound alike until one of them listens (socket(7), SO_REUSEADDR).
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise InputError(
            f"metrics_port {port} on {HOST} can't be used ({error.strerror}): choose another, "
            "or 0 for a free one"
        ) from error
    return sock


def _lru(_num_slots: int) -> EvictionPolicy:
    return LruPolicy()


async def _serve(
    settings: DaemonSettings,
    pool: PoolFile,
    listeners: Listeners,
    failures: list[BaseException],
) -> bool:
    """Serve until told to stop, or until something happens that the core rules out.

    Returns:
        Whether calls of tiers hang, which nobody waits for any more.
    """
    clock = SystemClock()
    policy = S3FifoPolicy if settings.eviction == "s3fifo" else _lru
    shell = Shell(pool, clock, policy, settings.quotas)
    metrics = Metrics(shell, clock)
    movement = Movement(settings, shell, clock, metrics.count)
    metrics.movement = movement
    announcer = _make_announcer(settings, clock, movement)
    shell.watcher = announcer
    server = Server(settings, shell, clock, metrics, movement)
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    loop.set_exception_handler(_stopping_on_defects(stopped, failures))
    runner = web.AppRunner(make_application(metrics), access_log=None)
    try:
        num_ready, num_dropped = recover(shell, pool, verify=settings.verify_on_start)
        metrics.count("blocks_recovered", num_ready)
        metrics.count("blocks_dropped", num_dropped)
        await _until_open(movement, stopped)
        if announcer is not None:
            announcer.open()
        await runner.setup()
        await web.SockSite(runner, listeners.http).start()
        if listeners.sequences is not None:
            metrics.sequences = listeners.sequences
            await listeners.sequences.open()
        listener = await _listen(loop, settings.socket_path, lambda: SessionProtocol(server))
        _announce(settings, pool, listeners)
        followers: list[Ticks] = [movement]
        if announcer is not None:
            followers.append(announcer)
        ticks = _begin_ticks(loop, shell, followers, _ending(stopped, failures))
        await stopped.wait()
        ticks()
        listener.close()
        server.close()
        # Sessions say goodbye in the loop's next turn.
        await asyncio.sleep(0)
    finally:
        if listeners.sequences is not None:
            await listeners.sequences.close()
        await movement.close()
        if announcer is not None:
            await announcer.close()
        await runner.cleanup()
        shell.close()
    return movement.is_hanging


def _make_announcer(
    settings: DaemonSettings, clock: Clock, movement: Movement
) -> "Announcer | None":
    if not settings.events_socket:
        return None
    from kvkeep.daemon.announcer import Announcer

    return Announcer(
        Path(settings.events_socket),
        clock,
        lambda key: any(tier.has(key) for tier in movement.tiers),
    )


async def _until_open(movement: Movement, stopped: asyncio.Event) -> None:
    """Wait a little for the tiers: requests that come at once then find what they keep."""
    loop = asyncio.get_running_loop()
    waiting = {loop.create_task(movement.opened()), loop.create_task(stopped.wait())}
    await asyncio.wait(waiting, timeout=OPEN_S, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()


def _stopping_on_defects(
    stopped: asyncio.Event, failures: list[BaseException]
) -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """What the loop does with an exception that nobody caught.

    It ends the connection it came from. If it came out of the core, nothing that the daemon
    remembers can be trusted any more: it ends, and its successor believes only the pool.
    """

    def take(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        loop.default_exception_handler(context)
        if isinstance(error, InvariantError):
            failures.append(error)
            stopped.set()

    return take


async def _listen(
    loop: asyncio.AbstractEventLoop, path: str, factory: Callable[[], SessionProtocol]
) -> asyncio.AbstractServer:
    before = os.umask(0o177)
    try:
        return await loop.create_unix_server(factory, path, backlog=BACKLOG)
    except OSError as error:
        raise InputError(
            f"the socket {path} can't be had ({error.strerror}): choose another socket"
        ) from error
    finally:
        os.umask(before)


def _announce(settings: DaemonSettings, pool: PoolFile, listeners: Listeners) -> None:
    ready = {
        "event": "ready",
        "socket": settings.socket_path,
        "metrics_port": listeners.http.getsockname()[1],
        "sequences_port": None if listeners.sequences is None else listeners.sequences.port,
        "pool": str(pool.path),
        "pid": os.getpid(),
        "generation": pool.generation,
    }
    sys.stdout.write(json.dumps(ready) + "\n")
    sys.stdout.flush()


def _ending(stopped: asyncio.Event, failures: list[BaseException]) -> Callable[[str], None]:
    """What ends the daemon because of what happened to its pool."""

    def end(harm: str) -> None:
        error = UnavailableError(f"the pool {harm} under the daemon: start it again")
        log.error("the daemon ends. reason=%s", error)
        failures.append(error)
        stopped.set()

    return end


def _begin_ticks(
    loop: asyncio.AbstractEventLoop,
    shell: Shell,
    followers: Sequence[Ticks],
    harmed: Callable[[str], None],
) -> Callable[[], None]:
    """Tell the core the time and look at the pool's file, again and again.

    Returns:
        What ends that.
    """
    handle: asyncio.TimerHandle | None = None

    def tick() -> None:
        nonlocal handle
        harm = shell.pool.find_harm()
        if harm is not None:
            harmed(harm)
            return
        handle = loop.call_later(TICK_S, tick)
        shell.handle(on.TimePassed())
        for follower in followers:
            follower.tick()

    def end() -> None:
        if handle is not None:
            handle.cancel()

    tick()
    return end
