"""Connections without sockets, in virtual time: what is written arrives late, and in order."""

import asyncio
from collections.abc import Callable

from kvkeep.router.relay.upstream import EndpointPool, UpstreamConnection
from kvkeep.router.snapshot import Endpoint
from kvkeep.testing.virtual_time import VirtualTime

LATENCY_S = 0.001


class Wire(asyncio.Transport):
    """One end of a connection; the other is whoever is told of bytes and of the end."""

    def __init__(
        self,
        time: VirtualTime,
        arrived: Callable[[bytes], None],
        closed: Callable[[], None],
        lost: Callable[[Exception | None], None],
    ) -> None:
        """Be open.

        Args:
            time: Everybody's.
            arrived: Told what was written, ``LATENCY_S`` late.
            closed: Told as late that this end closed.
            lost: Told, once and at this end, that the connection is over.
        """
        super().__init__()
        self._time, self._arrived, self._closed, self._lost = time, arrived, closed, lost
        self._is_open = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send it on its way; what is written after the end is lost, as it is on sockets."""
        if self._is_open:
            sent = bytes(data)
            self._time.after(LATENCY_S, lambda: self._arrived(sent))

    def is_closing(self) -> bool:
        """Whether it is over."""
        return not self._is_open

    def close(self) -> None:
        """End; what was written still arrives."""
        if self._is_open:
            self._is_open = False
            self._time.after(LATENCY_S, self._closed)
            self._time.after(0.0, lambda: self._lost(None))

    def lose(self, error: Exception | None) -> None:
        """The other end is gone."""
        if self._is_open:
            self._is_open = False
            self._time.after(LATENCY_S, lambda: self._lost(error))

    def abort(self) -> None:
        """End."""
        self.close()

    def can_write_eof(self) -> bool:
        """Not needed: whoever closes has said all."""
        return False

    def pause_reading(self) -> None:
        """There is always room for what is simulated."""

    def resume_reading(self) -> None:
        """It was never paused."""


class Serves:
    """Takes connections; a simulated engine's front."""

    is_listening: bool

    def connect(self, connection: UpstreamConnection) -> Wire:
        """Take one."""
        raise NotImplementedError


class WirePool(EndpointPool):
    """Connections to a simulated engine."""

    def __init__(self, endpoint: Endpoint, connect_timeout_s: float, server: Serves) -> None:
        super().__init__(endpoint, connect_timeout_s)
        self._server = server

    async def open(self) -> UpstreamConnection:
        """Connect; a dead engine refuses, a frozen one's host does not."""
        if not self._server.is_listening:
            raise ConnectionRefusedError
        connection = UpstreamConnection(self)
        connection.connection_made(self._server.connect(connection))
        return connection
