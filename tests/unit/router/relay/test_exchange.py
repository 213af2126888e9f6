"""What happens to a request when the engine, the client or the clock does something unexpected."""

import asyncio
import json

import pytest

from kvkeep.router.relay.exchange_state import TRANSITIONS, ExchangeState
from kvkeep.router.relay.upstream import EndpointPool, UpstreamConnection
from kvkeep.router.snapshot import EndpointState
from tests.unit.router.relay.wires import STREAM, Room, Wire, chunked, request, response, split

EVENT = b"data: 1\n\n"


def error_of(body: bytes) -> dict[str, object]:
    """The error that a body holds."""
    error = json.loads(body)["error"]
    assert isinstance(error, dict)
    return error


def status_of(wire: Wire) -> int:
    """Of the first response."""
    return int(wire.written[9:12])


class TestTheEngineFails:
    def test_before_it_answered(self) -> None:
        """The client is told with 502, and may ask again on its connection."""
        room = Room()
        client, wire = room.client()
        client.data_received(request())
        connection, _ = room.upstream()
        connection.is_reused = False
        connection.connection_lost(ConnectionResetError())
        head, body = split(bytes(wire.written))

        assert status_of(wire) == 502
        assert error_of(body)["type"] == "upstream_error"
        assert b"X-Kvkeep-Route: 127.0.0.1:1" in head
        assert wire.is_open
        assert room.endpoints[0].traffic.num_failed == 1

    def test_in_a_stream_of_events(self) -> None:
        """Whole events were passed on; then come an error, an end and a closed connection."""
        room = Room()
        client, wire = room.client()
        client.data_received(request())
        connection, _ = room.upstream()
        connection.data_received(STREAM + b"9\r\n" + EVENT + b'\r\n20\r\ndata: {"half')
        connection.connection_lost(ConnectionResetError())
        body = split(bytes(wire.written))[1]

        assert body.startswith(b"9\r\n" + EVENT + b"\r\n")
        assert b"half" not in body
        assert body.endswith(b"\r\n0\r\n\r\n")
        data = body.split(b"data: ")[2].split(b"\n\n")[0]
        assert error_of(data)["code"] == 502
        assert not wire.is_open
        assert not wire.was_aborted

    def test_in_a_body_with_a_length(self) -> None:
        """The connection is reset: half a body is not to be taken for a whole one."""
        room = Room()
        client, wire = room.client()
        client.data_received(request())
        connection, _ = room.upstream()
        connection.data_received(response(b"x" * 100)[:-10])
        connection.connection_lost(None)

        assert wire.was_aborted
        assert room.num_in_flight == 0

    def test_in_chunks_of_something_else(self) -> None:
        """No last chunk is made up; the connection is reset."""
        room = Room()
        client, wire = room.client()
        client.data_received(request())
        connection, _ = room.upstream()
        connection.data_received(
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n"
        )
        connection.connection_lost(None)

        assert wire.was_aborted
        assert not wire.written.endswith(b"0\r\n\r\n")

    def test_by_saying_nothing(self) -> None:
        """After the limit the engine's connection is closed, and the client told with 504."""
        room = Room(relay={"upstream_silence_s": 10.0})
        client, wire = room.client()
        client.data_received(request())
        _, upstream = room.upstream()
        room.clock.at_s += 9
        room.relay.look()
        assert not wire.written
        room.clock.at_s += 2
        room.relay.look()

        assert status_of(wire) == 504
        assert upstream.was_aborted

    def test_by_saying_nothing_more(self) -> None:
        """A stream that stops gets its error event; each event before starts the time anew."""
        room = Room(relay={"upstream_silence_s": 10.0})
        client, wire = room.client()
        client.data_received(request())
        connection, upstream = room.upstream()
        connection.data_received(STREAM)
        for _ in range(5):
            room.clock.at_s += 9
            connection.data_received(chunked([EVENT])[:-5])
            room.relay.look()
        assert b"error" not in wire.written
        for _ in range(2):
            room.clock.at_s += 11
            room.relay.look()

        assert b'"code": 504' in wire.written
        assert upstream.was_aborted

    @pytest.mark.parametrize("extra", [b"HTTP/1.1 200 OK\r\n\r\n", b"x"])
    def test_by_saying_too_much(self, extra: bytes) -> None:
        """What follows a response is not passed on, and its connection serves nobody else."""
        room = Room()
        client, wire = room.client()
        client.data_received(request())
        connection, upstream = room.upstream()
        connection.data_received(response(b"ok") + extra)

        assert split(bytes(wire.written))[1] == b"ok"
        assert upstream.was_aborted
        assert wire.is_open

    def test_by_speaking_unasked(self) -> None:
        """An idle connection that speaks could answer a request not sent yet: it is closed."""
        room = Room(idle=1)
        connection = room.upstreams[0]
        connection.data_received(response(b"poison"))
        wire = connection.transport
        assert isinstance(wire, Wire)

        assert wire.was_aborted
        assert room.relay.pool_of(room.endpoints[0]).take() is None


class TestTheClientLeaves:
    def test_while_the_engine_works(self) -> None:
        """The engine's connection is closed, so that it stops computing."""
        room = Room()
        client, _ = room.client()
        client.data_received(request())
        _, upstream = room.upstream()
        client.connection_lost(None)

        assert upstream.was_aborted
        assert room.endpoints[0].traffic.num_left == 1
        assert room.endpoints[0].traffic.num_failed == 0
        assert room.relay.gate.num_running == 0

    def test_while_it_is_sent(self) -> None:
        """In the middle of a stream as well."""
        room = Room()
        client, _ = room.client()
        client.data_received(request())
        connection, upstream = room.upstream()
        connection.data_received(STREAM + b"9\r\n" + EVENT + b"\r\n")
        client.connection_lost(ConnectionResetError())

        assert upstream.was_aborted
        assert room.num_in_flight == 0


class TestOtherEndings:
    def test_interim_responses_are_passed_on(self) -> None:
        """All but 100, which the relay has said itself."""
        room = Room()
        client, wire = room.client()
        client.data_received(request())
        connection, _ = room.upstream()
        connection.data_received(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
        )
        connection.data_received(response(b"ok"))

        assert wire.written.startswith(
            b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK"
        )

    @pytest.mark.parametrize("line", ["HTTP/1.1 204 No Content", "HTTP/1.1 304 Not Modified"])
    def test_statuses_without_a_body(self, line: str) -> None:
        """The response ends with its head, and both connections go on."""
        room = Room()
        client, wire = room.client()
        client.data_received(request())
        connection, upstream = room.upstream()
        connection.data_received(line.encode() + b"\r\nx: y\r\n\r\n")

        assert wire.written.endswith(b"\r\n\r\n")
        assert connection.listener is None
        assert wire.is_open
        assert upstream.is_open

    def test_head(self) -> None:
        """A length is announced, nothing follows, and the next request is served."""
        room = Room()
        client, wire = room.client()
        client.data_received(request(b"", line="HEAD /v1/x HTTP/1.1"))
        room.upstream()[0].data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n")
        client.data_received(request())
        room.upstream()[0].data_received(response(b"ok"))

        assert wire.written.count(b"HTTP/1.1 200 OK") == 2

    def test_an_early_response_ends_the_request(self) -> None:
        """An engine that answers before it has the body: the rest is read over, then it ends."""
        room = Room(relay={"gathered_bytes_max": 1024})
        client, wire = room.client()
        client.data_received(request(b"x" * 5000)[:3000])
        connection, upstream = room.upstream()
        connection.data_received(response(b"too large", line="HTTP/1.1 413 Too Large"))
        client.data_received(b"x" * 1000)

        assert b"Connection: close" in wire.written
        assert wire.written.endswith(b"too large")
        assert wire.has_eof
        assert wire.is_open
        assert upstream.was_aborted
        room.relay.look()
        room.clock.at_s += 5
        room.relay.look()
        assert wire.was_aborted


class TestAgain:
    async def test_a_kept_connection_that_the_engine_was_closing(self) -> None:
        """The request goes over a new connection, once, to the same endpoint."""
        room = Room(idle=1)
        opened = opening(room)
        client, wire = room.client()
        client.data_received(request(b"again"))
        room.upstreams[0].connection_lost(ConnectionResetError())
        await settle()
        connection, upstream = opened[0]
        assert upstream.written.endswith(b"again")
        connection.connection_lost(ConnectionResetError())
        await settle()

        assert len(opened) == 1
        assert status_of(wire) == 502

    async def test_what_has_begun_to_answer_is_not_asked_again(self) -> None:
        """Half a head shows that the engine has the request."""
        room = Room(idle=1)
        opened = opening(room)
        client, wire = room.client()
        client.data_received(request())
        room.upstreams[0].data_received(b"HTTP/1.1 2")
        room.upstreams[0].connection_lost(ConnectionResetError())
        await settle()

        assert opened == []
        assert status_of(wire) == 502

    async def test_an_engine_that_takes_no_connection(self) -> None:
        """Another one is asked, and the client sees nothing of it."""
        room = Room(num_endpoints=2, idle=0)
        opened = opening(room, refusing={room.endpoints[0].name})
        client, wire = room.client()
        client.data_received(request(b"again"))
        await settle()
        connection, upstream = opened[0]
        connection.data_received(response(b"ok"))

        assert upstream.written.endswith(b"again")
        assert status_of(wire) == 200
        assert b"X-Kvkeep-Route: 127.0.0.1:2;" in wire.written
        assert room.endpoints[0].traffic.num_failed == 1
        assert room.num_in_flight == 0

    async def test_nobody_takes_a_connection(self) -> None:
        """Then the client is told."""
        room = Room(num_endpoints=2, idle=0)
        opening(room, refusing={endpoint.name for endpoint in room.endpoints})
        client, wire = room.client()
        client.data_received(request())
        await settle()

        assert status_of(wire) == 502
        assert room.num_in_flight == 0

    def test_a_busy_engine(self) -> None:
        """503 before anything else: another one is asked; the last 503 is passed on as it came."""
        room = Room(num_endpoints=2)
        client, wire = room.client()
        client.data_received(request())
        connection, upstream = room.upstream()
        connection.data_received(response(b"busy", line="HTTP/1.1 503 Busy"))
        second, _ = room.upstream()
        assert upstream.was_aborted
        assert second is not connection
        second.data_received(response(b"busy too", line="HTTP/1.1 503 Busy"))

        assert status_of(wire) == 503
        assert wire.written.endswith(b"busy too")
        assert room.num_in_flight == 0

    def test_without_a_budget_nothing_is_tried_again(self) -> None:
        """Retries are a share of the requests; then the first failure is the answer."""
        limits = {"retry_share": 0.0, "retry_min_per_s": 0.0, "retry_burst": 1.0}
        room = Room(num_endpoints=2, limits=limits)
        statuses = []
        for _ in range(2):
            client, wire = room.client()
            client.data_received(request())
            for connection, _ in list(room.busy()):
                connection.data_received(response(b"busy", line="HTTP/1.1 503 Busy"))
            for connection, _ in list(room.busy()):
                connection.data_received(response(b"ok"))
            statuses.append(status_of(wire))

        assert statuses == [200, 503]

    def test_the_last_busy_engine_speaks_for_itself(self) -> None:
        """Without a budget its 503 is passed on as it came, with its Retry-After and nobody's."""
        limits = {"retry_share": 0.0, "retry_min_per_s": 0.0, "retry_burst": 1.0}
        room = Room(num_endpoints=2, limits=limits)
        room.relay.router.take_retry(room.clock.now_s())
        client, wire = room.client()
        client.data_received(request())
        said = response(b"busy", "Retry-After: 9", line="HTTP/1.1 503 Busy")
        room.upstream()[0].data_received(said)
        head, body = split(bytes(wire.written))

        assert (status_of(wire), body, not list(room.busy())) == (503, b"busy", True)
        assert head.lower().count(b"retry-after: ") == 1
        assert b"Retry-After: 9" in head
        assert room.parts.router.num_retries == 1
        assert room.num_in_flight == 0

    async def test_a_client_that_left_while_connecting(self) -> None:
        """The connection is kept for the next one."""
        room = Room(idle=0)
        opened = opening(room)
        client, _ = room.client()
        client.data_received(request())
        client.connection_lost(None)
        await settle()

        assert opened[0][1].written == b""
        assert room.relay.pool_of(room.endpoints[0]).num_idle == 1
        assert room.num_in_flight == 0


def test_nobody_is_ready() -> None:
    """503 with Retry-After, at once."""
    room = Room()
    room.endpoints[0].state = EndpointState.DOWN
    room.parts.fleet.changed()
    client, wire = room.client()
    client.data_received(request())

    assert status_of(wire) == 503
    assert b"Retry-After: 1\r\n" in wire.written
    assert wire.is_open


def test_an_unknown_model_is_not_found() -> None:
    """Where engines differ in their models, the name decides, and a wrong one is said to be."""
    room = Room(num_endpoints=2)
    for endpoint, model in zip(room.endpoints, ("a", "b"), strict=True):
        endpoint.models = frozenset({model})
    room.parts.fleet.changed()
    client, wire = room.client()
    for _ in range(3):
        client.data_received(request(b'{"model": "b"}'))
        room.upstream()[0].data_received(response())
    client.data_received(request(b'{"model": "c"}'))

    assert room.endpoints[1].traffic.num_done == 3
    assert b"HTTP/1.1 404 Not Found" in wire.written


def test_back_pressure_reaches_the_engine() -> None:
    """A client that does not read stops the engine's stream, and starts it again."""
    room = Room()
    client, _ = room.client()
    client.data_received(request())
    connection, upstream = room.upstream()
    connection.data_received(STREAM)
    client.pause_writing()
    assert not upstream.is_reading_wanted
    client.resume_writing()

    assert upstream.is_reading_wanted


def test_back_pressure_reaches_the_client() -> None:
    """An engine that does not read stops a large body, and starts it again."""
    room = Room(relay={"gathered_bytes_max": 1024})
    client, wire = room.client()
    client.data_received(request(b"x" * 50_000)[:3000])
    connection, upstream = room.upstream()
    connection.pause_writing()
    num_written = len(upstream.written)
    client.data_received(b"x" * 1000)  # read before the loop knew
    assert not wire.is_reading_wanted
    assert len(upstream.written) == num_written
    connection.resume_writing()

    assert wire.is_reading_wanted
    assert len(upstream.written) == num_written + 1000


def test_every_state_can_end() -> None:
    """From every state there is a way to OVER, and none from there."""
    assert set(TRANSITIONS) == set(ExchangeState)
    for state, after in TRANSITIONS.items():
        assert (ExchangeState.OVER in after) == (state is not ExchangeState.OVER)


def opening(room: Room, refusing: set[str] | None = None) -> list[tuple[UpstreamConnection, Wire]]:
    """Make new connections to wires; returns the list into which they come."""
    opened: list[tuple[UpstreamConnection, Wire]] = []
    for endpoint in room.endpoints:
        pool = room.relay.pool_of(endpoint)
        is_refused = endpoint.name in (refusing or ())

        async def open_wire(
            pool: EndpointPool = pool, refused: bool = is_refused
        ) -> UpstreamConnection:
            await asyncio.sleep(0)
            if refused:
                raise ConnectionRefusedError
            connection, wire = UpstreamConnection(pool), Wire()
            connection.connection_made(wire)
            opened.append((connection, wire))
            return connection

        pool.open = open_wire  # type: ignore[method-assign]
    return opened


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.mark.parametrize("policy", ["consistent_hash", "session_affinity", "prefix_aware"])
def test_requests_that_belong_together_go_together(policy: str) -> None:
    """A conversation stays where it began, whatever else is asked meanwhile."""
    room = Room(num_endpoints=4, policy=policy)
    routes: dict[int, set[bytes]] = {}
    for turn in range(4):
        for user in range(12):
            said = [{"role": "user", "content": f"I am {user}. " * 80}] * (turn + 1)
            client, wire = room.client()
            body = json.dumps({"messages": said, "user": str(user)}).encode()
            client.data_received(request(body))
            connection, _ = room.upstream()
            connection.data_received(response(b'{"usage": {"prompt_tokens": 240}}'))
            line = bytes(wire.written).partition(b"X-Kvkeep-Route: ")[2].partition(b";")[0]
            routes.setdefault(user, set()).add(line)

    assert all(len(lines) == 1 for lines in routes.values())
    assert len(set.union(*routes.values())) > 1
