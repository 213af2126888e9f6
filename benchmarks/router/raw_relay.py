"""Bytes from one socket to another on uvloop, unread: the floor of every relay on that loop."""

import asyncio
import itertools
import sys
from collections.abc import Iterator
from typing import cast

import uvloop


class Upstream(asyncio.Protocol):
    """The connection to an engine."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send what has come meanwhile."""
        self._client.upstream = cast(asyncio.Transport, transport)
        self._client.upstream.writelines(self._client.early)

    def data_received(self, data: bytes) -> None:
        """On to the client."""
        if not self._client.transport.is_closing():
            self._client.transport.write(data)


class Client(asyncio.Protocol):
    """A client's connection."""

    def __init__(self, ports: Iterator[int]) -> None:
        self._ports = ports
        self.early: list[bytes] = []
        self.upstream: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connect to the next engine."""
        self.transport = cast(asyncio.Transport, transport)
        loop = asyncio.get_running_loop()
        opening = loop.create_connection(lambda: Upstream(self), "127.0.0.1", next(self._ports))
        self._task = loop.create_task(opening)

    def data_received(self, data: bytes) -> None:
        """On to the engine."""
        if self.upstream is None:
            self.early.append(data)
        else:
            self.upstream.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Both ends close together."""
        if self.upstream is not None:
            self.upstream.close()


async def serve(ports: list[int]) -> None:
    """Serve on a free port until the process is ended."""
    turns = itertools.cycle(ports)
    server = await asyncio.get_running_loop().create_server(lambda: Client(turns), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve([int(port) for port in sys.argv[1:]]))
