"""A daemon from its settings to its end."""

import asyncio
import fcntl
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import uvloop
from aiohttp import web

from kvkeep.core import events as on
from kvkeep.daemon.http import HOST, make_application
from kvkeep.daemon.metrics import Metrics
from kvkeep.daemon.recovery import recover
from kvkeep.daemon.server import Server, SessionProtocol
from kvkeep.daemon.settings import DaemonSettings
from kvkeep.daemon.shell import Shell
from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import InputError, RefusedError
from kvkeep.tiers.shared_memory import PoolFile

log = logging.getLogger(__name__)

TICK_S = 0.25
"""How often leases are looked at; a lease ends at most this much late."""


def run(settings: DaemonSettings) -> None:
    """Serve until SIGTERM or SIGINT; the pool's blocks stay for the next daemon.

    Raises:
        InputError: A setting can't be had; nothing was left behind.
        RefusedError: The socket or the pool belongs to another daemon.
    """
    if not __debug__:
        raise InputError("kvkeep needs its assertions: start Python without -O")
    lock = _lock_socket(Path(settings.socket_path))
    pool = PoolFile.open(settings.pool_path, settings.pool_bytes)
    try:
        uvloop.run(_serve(settings, pool))
    finally:
        Path(settings.socket_path).unlink(missing_ok=True)
        os.close(lock)


def _lock_socket(path: Path) -> int:
    """Own the socket's path; a socket that a dead daemon left is removed.

    The lock file stays: were it removed, two daemons could each lock a file of that name.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise RefusedError(
            f"another daemon serves the socket {path}: stop it, or choose another socket"
        ) from error
    if path.exists() and not path.is_socket():
        os.close(lock)
        raise InputError(f"{path} exists and is not a socket: choose another socket")
    path.unlink(missing_ok=True)
    return lock


async def _serve(settings: DaemonSettings, pool: PoolFile) -> None:
    clock = SystemClock()
    shell = Shell(pool, clock)
    metrics = Metrics(shell, clock)
    server = Server(settings, shell, clock, metrics)
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    runner = web.AppRunner(make_application(metrics), access_log=None)
    await runner.setup()
    try:
        port = await _listen_http(runner, settings.metrics_port)
        num_ready, num_dropped = recover(shell, pool, verify=settings.verify_on_start)
        metrics.count("blocks_recovered", num_ready)
        metrics.count("blocks_dropped", num_dropped)
        listener = await _listen(loop, settings.socket_path, lambda: SessionProtocol(server))
        _announce(settings, pool, port)
        ticking = loop.create_task(_tick(shell))
        await stopped.wait()
        ticking.cancel()
        listener.close()
        server.close()
    finally:
        await runner.cleanup()
        shell.close()


async def _listen(
    loop: asyncio.AbstractEventLoop, path: str, factory: Callable[[], SessionProtocol]
) -> asyncio.AbstractServer:
    before = os.umask(0o177)
    try:
        return await loop.create_unix_server(factory, path, backlog=256)
    finally:
        os.umask(before)


async def _listen_http(runner: web.AppRunner, port: int) -> int:
    site = web.TCPSite(runner, HOST, port)
    try:
        await site.start()
    except OSError as error:
        raise InputError(
            f"metrics_port {port} on {HOST} can't be used ({error.strerror}): choose another, "
            "or 0 for a free one"
        ) from error
    bound: int = runner.addresses[0][1]
    return bound


def _announce(settings: DaemonSettings, pool: PoolFile, port: int) -> None:
    ready = {
        "event": "ready",
        "socket": settings.socket_path,
        "metrics_port": port,
        "pool": str(pool.path),
        "pid": os.getpid(),
        "generation": pool.generation,
    }
    sys.stdout.write(json.dumps(ready) + "\n")
    sys.stdout.flush()


async def _tick(shell: Shell) -> None:
    while True:
        await asyncio.sleep(TICK_S)
        shell.handle(on.TimePassed())
