"""The process that keeps the sequences: ``python -m kvkeep.daemon.sequences.program``.

A process of its own, for the daemon's event loop answers engines, which wait two milliseconds: no
body, however large, keeps it from that. It is told what to do in one line on its standard input,
and ends when that is closed, or at once with the daemon.
"""

import asyncio
import ctypes
import logging
import os
import signal
import socket
import sys

import msgspec
import uvloop
from aiohttp import web

from kvkeep.core.sequences import SequenceTable
from kvkeep.daemon.sequences.figures import GAUGES, SequenceFigures
from kvkeep.daemon.sequences.pages import Pages
from kvkeep.daemon.sequences.settings import SequenceSettings

CONNECTIONS_MAX = 128
"""At once; a further one is closed."""
BACKLOG = 128
IDLE_S = 75.0
"""How long an idle connection stays."""
LINGER_S = 2.0
"""How long a body that was refused is still read, so that its sender hears why; and how long
requests have to end when the daemon does."""
READY = b"ready\n"
_PR_SET_PDEATHSIG = 1


class Setup(msgspec.Struct, frozen=True):
    """What the daemon says first."""

    settings: SequenceSettings
    key: bytes | None
    socket_fd: int
    figures_fd: int
    daemon_pid: int


class _Full(asyncio.Protocol):
    """What a connection too many gets."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()


async def serve(setup: Setup) -> None:
    """Serve until standard input ends."""
    figures = SequenceFigures(setup.figures_fd)
    for name in GAUGES:
        figures.note(name, 0)
    settings = setup.settings
    table = SequenceTable(settings.bytes_max, settings.body_bytes_max)
    runner = web.AppRunner(
        Pages(settings, table, figures).application(setup.key),
        access_log=None,
        auto_decompress=False,
        keepalive_timeout=IDLE_S,
        lingering_time=LINGER_S,
        shutdown_timeout=LINGER_S,
    )
    await runner.setup()
    clients = runner.server
    assert clients is not None

    def admit() -> asyncio.Protocol:
        return _Full() if len(clients.connections) >= CONNECTIONS_MAX else clients()

    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), ended.set)
    listener = await loop.create_server(
        admit, sock=socket.socket(fileno=setup.socket_fd), backlog=BACKLOG
    )
    os.write(sys.stdout.fileno(), READY)
    await ended.wait()
    listener.close()
    await runner.cleanup()


def _die_with(daemon_pid: int) -> None:
    """End at once when the daemon does: its port is for the next one."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != daemon_pid:
        sys.exit(0)


def _read_setup() -> Setup:
    """The first line of standard input, read without what may follow it."""
    line = bytearray()
    while not line.endswith(b"\n"):
        part = os.read(sys.stdin.fileno(), 1)
        if not part:
            sys.exit(0)
        line += part
    return msgspec.json.decode(line, type=Setup)


def main() -> None:
    """Be that process."""
    # A terminal's Ctrl-C is for the daemon, which closes standard input in its turn.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    setup = _read_setup()
    _die_with(setup.daemon_pid)
    uvloop.run(serve(setup))


if __name__ == "__main__":
    main()
