"""A relay without a network: clients and engines are buffers, and nothing happens by itself."""

import asyncio
from collections.abc import Iterator

from kvkeep.model.clock import Clock
from kvkeep.router.relay.relay import Relay
from kvkeep.router.relay.server import ClientConnection
from kvkeep.router.relay.upstream import EndpointPool, UpstreamConnection
from kvkeep.router.run import Parts
from kvkeep.router.settings import load_settings
from kvkeep.router.snapshot import Endpoint, EndpointState


class ManualClock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.at_s = 1000.0

    def now_s(self) -> float:
        """What the test says."""
        return self.at_s


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.is_open = self.is_reading_wanted = True
        self.was_aborted = self.has_eof = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Keep it; nothing is written after the end."""
        assert self.is_open
        assert not self.has_eof
        self.written += data

    def can_write_eof(self) -> bool:
        """As TCP."""
        return True

    def write_eof(self) -> None:
        """Nothing more will be written."""
        self.has_eof = True

    def is_closing(self) -> bool:
        """Whether it is over."""
        return not self.is_open

    def close(self) -> None:
        """End in order."""
        self.is_open = False

    def abort(self) -> None:
        """End at once."""
        self.is_open, self.was_aborted = False, True

    def pause_reading(self) -> None:
        """Nothing more is wanted for now."""
        assert self.is_reading_wanted
        self.is_reading_wanted = False

    def resume_reading(self) -> None:
        """More is wanted."""
        self.is_reading_wanted = True


class Room:
    """One relay, its endpoints ready, and connections to each."""

    def __init__(self, *, num_endpoints: int = 1, idle: int = 4, **settings: object) -> None:
        self.clock = ManualClock()
        urls = [f"http://127.0.0.1:{port + 1}" for port in range(num_endpoints)]
        clock: Clock = self.clock
        self.parts = Parts(load_settings(None, {}, {"engines": urls, **settings}), clock)
        self.relay: Relay = self.parts.relay
        self.upstreams: list[UpstreamConnection] = []
        self.endpoints: list[Endpoint] = list(self.parts.fleet)
        for endpoint in self.endpoints:
            endpoint.state = EndpointState.READY
        self.parts.fleet.changed()
        for endpoint in self.endpoints:
            for _ in range(idle):
                self.connect(self.relay.pool_of(endpoint))

    def connect(self, pool: EndpointPool) -> UpstreamConnection:
        """Put one more idle connection into a pool."""
        connection = UpstreamConnection(pool)
        connection.connection_made(Wire())
        pool.give_back(connection, self.clock.at_s)
        self.upstreams.append(connection)
        return connection

    def client(self) -> tuple[ClientConnection, Wire]:
        """A new client."""
        connection, wire = ClientConnection(self.relay), Wire()
        connection.connection_made(wire)
        return connection, wire

    def busy(self) -> Iterator[tuple[UpstreamConnection, Wire]]:
        """Connections to engines that serve a request now."""
        for connection in self.upstreams:
            if connection.listener is not None:
                wire = connection.transport
                assert isinstance(wire, Wire)
                yield connection, wire

    def upstream(self) -> tuple[UpstreamConnection, Wire]:
        """The one connection that serves a request now."""
        (found,) = self.busy()
        return found

    @property
    def num_in_flight(self) -> int:
        """What the counters say runs."""
        return sum(endpoint.num_in_flight for endpoint in self.endpoints)


def request(
    body: bytes = b"{}", *fields: str, line: str = "POST /v1/completions HTTP/1.1"
) -> bytes:
    """A request with a length."""
    head = "\r\n".join([line, "Host: a", *fields, f"Content-Length: {len(body)}", "", ""])
    return head.encode("latin-1") + body


def response(body: bytes = b"{}", *fields: str, line: str = "HTTP/1.1 200 OK") -> bytes:
    """A response with a length."""
    head = "\r\n".join([line, *fields, f"content-length: {len(body)}", "", ""])
    return head.encode("latin-1") + body


def chunked(pieces: list[bytes]) -> bytes:
    """A body in chunks."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece) + (
        b"0\r\n\r\n"
    )


def unchunked(data: bytes) -> bytes:
    """The payload of a whole chunked body, by a reader of its own."""
    payload = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        if int(size, 16) == 0:
            assert data == b"\r\n"
            return payload
        payload += data[: int(size, 16)]
        assert data[int(size, 16) :][:2] == b"\r\n"
        data = data[int(size, 16) + 2 :]


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def split(data: bytes) -> tuple[bytes, bytes]:
    """Head and body of what was written."""
    head, _, body = data.partition(b"\r\n\r\n")
    return head, body
