"""Connections to engines: kept while idle, lent to one exchange at a time.

Everything here runs on the event loop's thread and never blocks.
"""

import asyncio
import os
from typing import Protocol, cast

from kvkeep.router.relay.plain import Pump
from kvkeep.router.snapshot import Endpoint

IDLE_PER_ENDPOINT_MAX = 512
"""Idle connections kept for an endpoint; each is a file on both sides."""


class Listener(Protocol):
    """Who a connection is lent to."""

    def upstream_data(self, data: bytes) -> None:
        """The engine sent bytes."""
        ...

    def upstream_lost(self, error: Exception | None) -> None:
        """The connection is over; None if the engine ended it in order."""
        ...

    def upstream_writable(self, is_writable: bool) -> None:
        """The engine takes less than it is sent, or has caught up."""
        ...

    def pump_ended(self, unsent: bytes) -> None:
        """A pump ended by itself; the client did not take these bytes of what it passed on."""
        ...


class UpstreamConnection(asyncio.Protocol):
    """One connection to an engine."""

    __slots__ = ("_pool", "_pumped_fd", "idle_since_s", "is_reused", "listener", "transport")

    transport: asyncio.Transport

    def __init__(self, pool: "EndpointPool") -> None:
        self._pool = pool
        self._pumped_fd = -1
        """The socket once more while a pump reads it: the loop knows a descriptor in one way."""
        self.listener: Listener | None = None
        self.is_reused = False
        """Whether it has served before: the engine may close it at any time."""
        self.idle_since_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The engine took the connection."""
        # uvloop's transports are none by inheritance, only by what they can do.
        self.transport = cast(asyncio.Transport, transport)
        self._pool.remember(self)

    def data_received(self, data: bytes) -> None:
        """Bytes of a response; without an exchange there is nothing an engine could answer."""
        if self.listener is None:
            self.transport.abort()
        else:
            self.listener.upstream_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        listener, self.listener = self.listener, None
        self.end_pump()
        self._pool.forget(self)
        if listener is not None:
            listener.upstream_lost(exc)

    def pause_writing(self) -> None:
        """The engine reads slower than the client sends."""
        if self.listener is not None:
            self.listener.upstream_writable(False)

    def resume_writing(self) -> None:
        """It has caught up."""
        if self.listener is not None:
            self.listener.upstream_writable(True)

    def abort(self) -> None:
        """Close at once and tell nobody; vLLM aborts a request whose connection is gone."""
        self.listener = None
        self.end_pump()
        self.transport.abort()

    def begin_pump(self, client: asyncio.Transport, is_lines: bool) -> "Pump | None":
        """Pass on what comes without a look at it by Python, as long as it is whole chunks.

        The rest comes to the listener as ever, after ``pump_ended``; ``end_pump`` ends it sooner.

        Args:
            client: Where it goes; it has all that was written to it, and nobody writes meanwhile.
            is_lines: Whether only whole lines are passed on, as of a stream of events.

        Returns:
            None if there are no sockets that this could be done with.
        """
        ours, theirs = self.transport.get_extra_info("socket"), client.get_extra_info("socket")
        if Pump is None or ours is None or theirs is None or client.get_write_buffer_size():
            return None
        # Its own descriptor, but not the client's: that one stays open until the listener, who ends
        # the pump then, was told that the client is gone.
        try:
            self._pumped_fd = os.dup(ours.fileno())
        except OSError:  # no descriptor is left: the stream goes on as before
            return None
        pump = Pump(self._pumped_fd, theirs.fileno(), is_lines, self._pump_ended)
        self.transport.pause_reading()
        asyncio.get_running_loop().add_reader(self._pumped_fd, pump)
        return pump

    @property
    def is_pumped(self) -> bool:
        """Whether a pump reads it."""
        return self._pumped_fd >= 0

    def end_pump(self) -> None:
        """Read as ever again, if a pump runs."""
        pumped_fd, self._pumped_fd = self._pumped_fd, -1
        if pumped_fd < 0:
            return
        asyncio.get_running_loop().remove_reader(pumped_fd)
        os.close(pumped_fd)

    def _pump_ended(self, unsent: bytes, unread: bytes, error: int) -> None:
        """A pump has found what is not for it: the end of the connection, if it is nothing else."""
        self.end_pump()
        listener = self.listener
        assert listener is not None
        self.transport.resume_reading()
        listener.pump_ended(unsent)
        if unread:
            listener.upstream_data(unread)
        elif error:
            self.abort()
            listener.upstream_lost(OSError(error, os.strerror(error)))


class EndpointPool:
    """The connections to one endpoint."""

    def __init__(self, endpoint: Endpoint, connect_timeout_s: float) -> None:
        self._endpoint, self._connect_timeout_s = endpoint, connect_timeout_s
        self._idle: list[UpstreamConnection] = []
        self._open: set[UpstreamConnection] = set()
        self._is_retired = False

    @property
    def num_open(self) -> int:
        """Connections, idle or not."""
        return len(self._open)

    @property
    def num_idle(self) -> int:
        """Connections that wait for a request."""
        return len(self._idle)

    def take(self) -> UpstreamConnection | None:
        """The connection that was used last, if one is idle: the others may rest and be closed."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing():
                return connection
        return None

    async def open(self) -> UpstreamConnection:
        """Connect.

        Raises:
            OSError: The endpoint takes no connection; TimeoutError if it did not answer.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._connect_timeout_s):
            _, connection = await loop.create_connection(
                lambda: UpstreamConnection(self), self._endpoint.host, self._endpoint.port
            )
        return connection

    def remember(self, connection: UpstreamConnection) -> None:
        """A connection was made."""
        self._open.add(connection)

    def give_back(self, connection: UpstreamConnection, now_s: float) -> None:
        """Keep a connection whose response is over for the next request."""
        connection.listener = None
        is_full = self._is_retired or len(self._idle) >= IDLE_PER_ENDPOINT_MAX
        if connection.transport.is_closing() or is_full:
            connection.transport.abort()
            return
        connection.is_reused, connection.idle_since_s = True, now_s
        self._idle.append(connection)

    def forget(self, connection: UpstreamConnection) -> None:
        """A connection is over."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def close_idle(self, since_s: float) -> None:
        """Close what has been idle since then or longer; the oldest come first."""
        while self._idle and self._idle[0].idle_since_s <= since_s:
            self._idle.pop(0).transport.abort()

    def retire(self) -> None:
        """The endpoint left: keep no connection from now on."""
        self._is_retired = True
        while self._idle:
            self._idle.pop().transport.abort()

    def close(self) -> None:
        """Close every connection."""
        for connection in list(self._open):
            connection.transport.abort()
