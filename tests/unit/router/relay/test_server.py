"""What a client may do with its connection, and what becomes of it."""

import json
import os

import pytest

from kvkeep.router.relay.server import LINGER_BYTES_MAX, PIPELINED_BYTES_MAX
from tests.unit.router.relay.wires import Room, Wire, request, response, split


def status_of(wire: Wire) -> int:
    """Of the first response."""
    return int(wire.written[9:12])


def serve_all(room: Room) -> int:
    """Answer whatever waits for an answer, again and again; returns how many requests that were."""
    num_served = 0
    while found := list(room.busy()):
        for connection, _ in found:
            num_served += 1
            connection.data_received(response(b"%d" % num_served))
    return num_served


class TestManyRequests:
    def test_one_after_another(self) -> None:
        """A connection serves requests until it is closed, each over a kept connection."""
        room = Room(idle=1)
        client, wire = room.client()
        for _ in range(5):
            client.data_received(request())
            assert serve_all(room) == 1

        assert wire.is_open
        assert wire.written.count(b"HTTP/1.1 200 OK") == 5

    def test_pipelined_ones_are_answered_in_order(self) -> None:
        """All come at once; one at a time is served."""
        room = Room()
        client, wire = room.client()
        client.data_received(request() * 20)
        assert len(list(room.busy())) == 1
        assert serve_all(room) == 20

        bodies = [part.split(b"\r\n\r\n")[1] for part in bytes(wire.written).split(b"HTTP/1.1")[1:]]
        assert bodies == [b"%d" % (number + 1) for number in range(20)]

    def test_a_thousand_pipelined_ones_that_need_no_engine(self) -> None:
        """They are served in a loop: no stack grows."""
        room = Room()
        client, wire = room.client()
        client.data_received(request(b"", line="GET /health HTTP/1.1") * 3000)

        assert wire.written.count(b"HTTP/1.1 200 OK") == 3000

    def test_a_flood_is_not_read_on(self) -> None:
        """What waits behind a request is limited; it is read when its turn comes."""
        room = Room()
        client, wire = room.client()
        client.data_received(request())
        flood = request(b"x" * 900) * (PIPELINED_BYTES_MAX // 900)
        client.data_received(flood)
        assert not wire.is_reading_wanted
        serve_all(room)

        assert wire.is_reading_wanted

    def test_a_stalled_client_gets_no_further_request_served(self) -> None:
        """Responses that nobody reads must not pile up."""
        room = Room()
        client, wire = room.client()
        client.pause_writing()
        client.data_received(request())
        assert list(room.busy()) == []
        client.resume_writing()

        assert len(list(room.busy())) == 1
        assert wire.is_open


@pytest.mark.parametrize(
    "head",
    [
        "POST /v1/x HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 2",
        "POST /v1/x HTTP/1.0\r\nContent-Length: 2",
    ],
)
def test_a_connection_that_shall_close_closes(head: str) -> None:
    """After the response, which says so; what comes behind is not served."""
    room = Room()
    client, wire = room.client()
    client.data_received(head.encode() + b"\r\n\r\n{}")
    serve_all(room)

    assert b"Connection: close\r\n" in wire.written
    assert not wire.is_open


def test_a_malformed_request_is_answered_and_ends_the_connection() -> None:
    """Requests before it were served; nothing after it is."""
    room = Room()
    client, wire = room.client()
    client.data_received(request() + b"POST /v1/x HTTP/1.1\r\nbad\r\n\r\n" + request())
    assert serve_all(room) == 1

    assert wire.written.count(b"HTTP/1.1 ") == 2
    assert b"HTTP/1.1 400 Bad Request" in wire.written
    assert list(room.busy()) == []
    assert wire.has_eof
    assert room.relay.num_malformed == 1


def test_who_sends_on_after_the_end_is_listened_to_for_a_while() -> None:
    """A connection that is closed with bytes unread would lose its last response."""
    room = Room()
    client, wire = room.client()
    client.data_received(b"GARBAGE\r\n\r\n" + b"x" * 100)
    assert wire.is_open
    client.data_received(b"x" * (LINGER_BYTES_MAX + 1))

    assert wire.was_aborted


def test_expect_is_answered_before_the_body() -> None:
    """Once, and not to whoever sends the body anyway."""
    room = Room()
    client, wire = room.client()
    whole = request(b"abc", "Expect: 100-continue")
    client.data_received(whole[:-3])
    assert wire.written == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.data_received(b"abc" + whole)
    assert serve_all(room) == 2

    assert wire.written.count(b"100 Continue") == 1


class TestLimits:
    def test_of_the_head(self) -> None:
        """431, before the head ends."""
        room = Room()
        client, wire = room.client()
        client.data_received(b"POST /v1/x HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70_000)

        assert status_of(wire) == 431

    @pytest.mark.parametrize("coding", ["Content-Length: 100000", "Transfer-Encoding: chunked"])
    def test_of_the_body(self, coding: str) -> None:
        """413: at once where the length is given, else when it is reached."""
        room = Room(relay={"body_bytes_max": 50_000})
        client, wire = room.client()
        client.data_received(f"POST /v1/x HTTP/1.1\r\nHost: a\r\n{coding}\r\n\r\n".encode())
        for _ in range(60):
            client.data_received(b"3e8\r\n" + b"x" * 1000 + b"\r\n")

        assert status_of(wire) == 413
        assert room.num_in_flight == 0

    def test_of_a_body_that_is_on_its_way(self) -> None:
        """The engine sees a broken request, the client 413."""
        room = Room(relay={"body_bytes_max": 50_000, "gathered_bytes_max": 1024})
        client, wire = room.client()
        client.data_received(
            b"POST /v1/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        client.data_received((b"3e8\r\n" + b"x" * 1000 + b"\r\n") * 3)
        _, upstream = room.upstream()
        client.data_received((b"3e8\r\n" + b"x" * 1000 + b"\r\n") * 60)

        assert upstream.was_aborted
        assert status_of(wire) == 413
        assert room.num_in_flight == 0
        assert room.relay.gate.num_running == 0

    def test_of_connections(self) -> None:
        """One more is told why it is closed."""
        room = Room(relay={"connections_max": 2})
        wires = [room.client()[1] for _ in range(3)]

        assert [bytes(wire.written[:12]) for wire in wires] == [b"", b"", b"HTTP/1.1 503"]

    def test_of_requests_at_once(self) -> None:
        """One waits; it is served when the first has ended."""
        room = Room(limits={"in_flight_max": 1})
        clients = [room.client() for _ in range(2)]
        for client, _ in clients:
            client.data_received(request())
        assert len(list(room.busy())) == 1
        assert serve_all(room) == 2

        assert all(b"200 OK" in wire.written for _, wire in clients)

    def test_of_waiting(self) -> None:
        """Whoever waits too long gets 503 and when to come back; so does whoever finds no place."""
        room = Room(limits={"in_flight_max": 1, "queue_max": 1, "queue_wait_s": 5.0})
        clients = [room.client() for _ in range(3)]
        for client, _ in clients:
            client.data_received(request())
        assert status_of(clients[2][1]) == 503
        room.clock.at_s += 6
        room.relay.look()

        assert status_of(clients[1][1]) == 503
        assert clients[1][1].written.count(b"Retry-After: ") == 1
        assert clients[1][1].is_open

    def test_a_client_that_leaves_the_queue_makes_room(self) -> None:
        """Nobody is served for it."""
        room = Room(limits={"in_flight_max": 1})
        (first, _), (second, _) = room.client(), room.client()
        first.data_received(request())
        second.data_received(request())
        second.connection_lost(None)
        serve_all(room)

        assert room.endpoints[0].traffic.num_done == 1
        assert room.relay.gate.num_running == 0


class TestTime:
    def test_for_a_head(self) -> None:
        """408, however slowly it goes on."""
        room = Room(relay={"head_timeout_s": 10.0})
        client, wire = room.client()
        for letter in b"POST /v1/x HT":
            client.data_received(bytes([letter]))
            room.clock.at_s += 1
            room.relay.look()

        assert status_of(wire) == 408
        assert wire.has_eof

    @pytest.mark.parametrize("gathered", [1024, 1 << 20])
    def test_for_a_body(self, gathered: int) -> None:
        """408 after a silence, whether it is gathered or on its way; the engine is let go."""
        room = Room(relay={"body_silence_s": 10.0, "gathered_bytes_max": gathered})
        client, wire = room.client()
        client.data_received(request(b"x" * 5000)[:3000])
        for _ in range(3):
            room.clock.at_s += 6
            room.relay.look()

        assert status_of(wire) == 408
        assert room.num_in_flight == 0

    def test_for_nothing(self) -> None:
        """An idle connection is closed without a word."""
        room = Room(relay={"idle_s": 60.0})
        _, wire = room.client()
        room.clock.at_s += 61
        room.relay.look()

        assert not wire.is_open
        assert wire.written == b""

    def test_for_reading(self) -> None:
        """A client that takes nothing of its response is cut off, and the engine let go."""
        room = Room(relay={"stall_s": 60.0})
        client, wire = room.client()
        client.data_received(request())
        _, upstream = room.upstream()
        client.pause_writing()
        room.clock.at_s += 61
        room.relay.look()
        client.connection_lost(None)

        assert wire.was_aborted
        assert upstream.was_aborted

    def test_for_an_idle_engine(self) -> None:
        """Kept connections are closed before the engine closes them."""
        room = Room(idle=2, relay={"upstream_idle_s": 4.0})
        room.clock.at_s += 5
        room.relay.look()

        assert room.relay.pool_of(room.endpoints[0]).num_idle == 0


class TestTheEnd:
    def test_new_requests_are_refused_while_others_end(self) -> None:
        """503 with Connection: close; what runs gets its whole response."""
        room = Room()
        (running, wire), (late, late_wire) = room.client(), room.client()
        running.data_received(request())
        room.relay.drain()
        late.data_received(request())
        assert status_of(late_wire) == 503
        assert b"Connection: close\r\n" in late_wire.written
        assert not room.relay.is_quiet
        serve_all(room)

        assert wire.written.endswith(b"\r\n\r\n1")
        assert b"Connection: close\r\n" in wire.written
        assert not wire.is_open

    async def test_what_still_runs_at_the_end_is_told(self) -> None:
        """503 where nothing was sent, and nothing is left open."""
        room = Room()
        client, wire = room.client()
        client.data_received(request())
        await room.relay.close()

        assert status_of(wire) == 503
        assert not wire.is_open
        assert room.num_in_flight == 0


class TestAnswersOfItsOwn:
    def test_health(self) -> None:
        """200 while an engine is ready, and 503 while the router drains."""
        room = Room(num_endpoints=2)
        client, wire = room.client()
        ask = request(b"", line="GET /health?x=1 HTTP/1.1")
        client.data_received(ask)
        assert json.loads(split(bytes(wire.written))[1])["ready"] == 2
        wire.written.clear()
        room.relay.drain()
        client.data_received(ask)

        assert status_of(wire) == 503

    @pytest.mark.parametrize("path", ["/metrics", "/reset_prefix_cache", "/", "/v1", "/V1/models"])
    def test_what_is_not_for_clients_is_not_there(self, path: str) -> None:
        """An engine's switches can't be reached through the router."""
        room = Room()
        client, wire = room.client()
        client.data_received(request(line=f"POST {path} HTTP/1.1"))

        assert status_of(wire) == 404
        assert list(room.busy()) == []

    def test_a_request_for_keys(self, tmp_path: object) -> None:
        """Without a key 401; with one the request goes on as it came, its key included."""
        file = f"{tmp_path}/keys.yaml"
        with open(file, "w", opener=private) as opened:
            opened.write("- {name: a, key: 0123456789abcdef}")
        room = Room(limits={"keys_file": file})
        client, wire = room.client()
        client.data_received(request())
        assert status_of(wire) == 401
        assert b"WWW-Authenticate: Bearer\r\n" in wire.written
        client.data_received(request(b"{}", "Authorization: Bearer 0123456789abcdef"))

        assert b"Authorization: Bearer 0123456789abcdef\r\n" in room.upstream()[1].written


def private(path: str, flags: int) -> int:
    """Open a file that nobody else may read."""
    return os.open(path, flags, 0o600)
