"""The address for sequences, and the process behind it: the daemon's side of both.

The daemon takes the address and keeps it. The process that serves it is started anew if it ends by
itself: what it kept is gone then, whole.
"""

import asyncio
import contextlib
import logging
import os
import socket
import sys
from pathlib import Path

import msgspec

from kvkeep.daemon.sequences.figures import SequenceFigures
from kvkeep.daemon.sequences.program import BACKLOG, LINGER_S, READY, Setup
from kvkeep.daemon.sequences.settings import SequenceSettings
from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.model.loopback import is_loopback
from kvkeep.model.private_file import read_secret

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "kvkeep.daemon.sequences.program")
START_S = 60.0
"""A start takes a second; on a busy machine many."""
RESTART_S = 1.0
"""Before a process that ended by itself is followed by another one."""
END_S = LINGER_S + 3.0


class SequenceListener:
    """An address that is taken, then opened, then closed."""

    def __init__(self, settings: SequenceSettings) -> None:
        """Take the address.

        Raises:
            InputError: It can't be had, or others reach it and no key is asked for.
        """
        self._settings = settings
        self._key = _find_key(settings)
        self._socket = _bind(settings)
        self.figures = SequenceFigures()
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port that was taken."""
        return int(self._socket.getsockname()[1])

    @property
    def pid(self) -> int | None:
        """Of the process that serves now."""
        return None if self._process is None else self._process.pid

    def status(self) -> dict[str, object]:
        """For ``/status``."""
        return {"port": self.port, "pid": self.pid, **self.figures.status()}

    async def open(self) -> None:
        """Let clients in, from now on.

        Raises:
            UnavailableError: The process can't be started.
        """
        await self._start()
        self._watch = asyncio.get_running_loop().create_task(self._follow())

    async def close(self) -> None:
        """Let nobody in any more; requests that run have a moment to end."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        if self._process is not None:
            await _end(self._process)
        self._process = None

    def release(self) -> None:
        """Give the address back; closed, or never opened."""
        self._socket.close()
        self.figures.close()

    async def _start(self) -> None:
        fds = self._socket.fileno(), self.figures.fd
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=fds,
        )
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        setup = Setup(self._settings, self._key, *fds, os.getpid())
        process.stdin.write(msgspec.json.encode(setup) + b"\n")
        try:
            async with asyncio.timeout(START_S):
                line = await process.stdout.readline()
        except TimeoutError:
            line = b""
        if line != READY:
            await _end(process)
            raise UnavailableError(
                "the process that keeps sequences did not start: see what it wrote to standard "
                "error, or leave out the setting sequences"
            )

    async def _follow(self) -> None:
        while True:
            if self._process is not None:
                code = await self._process.wait()
                log.error("the process that keeps sequences ended: they are gone. code=%s", code)
            await asyncio.sleep(RESTART_S)
            try:
                await self._start()
            except (UnavailableError, OSError) as error:
                log.error("sequences can't be kept. reason=%s", error)  # noqa: TRY400
                continue
            self.figures.count("sequences_restarts")


async def _end(process: asyncio.subprocess.Process) -> None:
    """Close a process's standard input, which ends it; soon, whatever it does."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(END_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _find_key(settings: SequenceSettings) -> bytes | None:
    if settings.key_file:
        return read_secret(Path(settings.key_file).expanduser(), "key file of sequences")
    if not is_loopback(settings.host):
        raise InputError(
            f"sequences.host {settings.host} lets other machines in: name a key with "
            "sequences.key_file, or listen on 127.0.0.1"
        )
    return None


def _bind(settings: SequenceSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((settings.host.strip("[]"), settings.port))
        # Whoever comes while the process is started anew waits for it.
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except (OSError, UnicodeError) as error:
        sock.close()
        raise InputError(
            f"sequences.port {settings.port} on {settings.host} can't be used ({error}): choose "
            "another, or 0 for a free one"
        ) from error
    return sock
