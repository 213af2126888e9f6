"""Totals count clients' requests by what these got; an engine's row counts what it was sent."""

from collections.abc import Callable

import pytest

from kvkeep.router.relay.server import ClientConnection
from kvkeep.router.snapshot import EndpointState
from tests.unit.router.relay.wires import STREAM, Room, Wire, chunked, request, response

BODY = b'{"prompt": "a"}'
USAGE = b'{"usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}}'
BUSY = response(b"busy", line="HTTP/1.1 503 Busy")
Ends = Callable[[Room, ClientConnection, Wire], None]


def ends(room: Room) -> tuple[int, int, int]:
    """Requests done, failed and left, of the totals."""
    total = room.parts.router.total
    return total.num_done, total.num_failed, total.num_left


def test_what_is_tried_again_counts_once() -> None:
    """Done is what clients got; the busy engine's row says what it did not serve."""
    room = Room(num_endpoints=2, limits={"retry_min_per_s": 100.0, "retry_burst": 100.0})
    busy, good = room.endpoints
    for _ in range(20):
        client, wire = room.client()
        client.data_received(request(BODY))
        if busy.num_in_flight:
            room.upstream()[0].data_received(BUSY)
        room.connect(room.relay.pool_of(busy))
        room.upstream()[0].data_received(response(USAGE))
        assert wire.written.startswith(b"HTTP/1.1 200")
    total = room.parts.router.total

    assert ends(room) == (20, 0, 0)
    assert busy.traffic.num_failed == room.parts.router.num_retries > 0
    assert (busy.traffic.num_done, good.traffic.num_done) == (0, 20)
    assert (total.num_untold, busy.traffic.num_untold, total.prompt_tokens) == (0, 0, 140)
    assert (total.request_bytes, busy.traffic.request_bytes > 0) == (20 * len(BODY), True)
    assert total.response_bytes == good.traffic.response_bytes


def answered(data: bytes) -> Ends:
    """The engine answers so, and so does every other one that is asked."""

    def act(room: Room, _client: ClientConnection, _wire: Wire) -> None:
        while found := list(room.busy()):
            found[0][0].data_received(data)

    return act


def broken(data: bytes) -> Ends:
    """The engine breaks off behind this."""

    def act(room: Room, _client: ClientConnection, _wire: Wire) -> None:
        connection, _ = room.upstream()
        connection.is_reused = False
        if data:
            connection.data_received(data)
        connection.connection_lost(ConnectionResetError())

    return act


def silent(room: Room, _client: ClientConnection, _wire: Wire) -> None:
    room.clock.at_s += room.relay.settings.upstream_silence_s + 1
    room.relay.look()


def left(_room: Room, client: ClientConnection, _wire: Wire) -> None:
    client.connection_lost(None)


def unread(room: Room, client: ClientConnection, _wire: Wire) -> None:
    room.upstream()[0].data_received(STREAM + chunked([b"data: 1\n\n"])[:-5])
    client.pause_writing()
    room.clock.at_s += room.relay.settings.stall_s + 1
    room.relay.look()


def stopped(_room: Room, client: ClientConnection, _wire: Wire) -> None:
    client.stop("the router stops")


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        pytest.param(answered(response()), (1, 0, 0), id="ok"),
        pytest.param(answered(response(line="HTTP/1.1 400 Wrong")), (1, 0, 0), id="bad request"),
        pytest.param(answered(BUSY), (0, 1, 0), id="busy"),
        pytest.param(answered(response(line="HTTP/1.1 500 No")), (0, 1, 0), id="error"),
        pytest.param(answered(response(line="HTTP/1.1 501 No")), (0, 1, 0), id="not implemented"),
        pytest.param(broken(b""), (0, 1, 0), id="no answer"),
        pytest.param(broken(STREAM), (0, 1, 0), id="broken stream"),
        pytest.param(broken(response(b"12345")[:-1]), (0, 1, 0), id="broken body"),
        pytest.param(silent, (0, 1, 0), id="silent engine"),
        pytest.param(stopped, (0, 1, 0), id="router stops"),
        pytest.param(left, (0, 0, 1), id="client left"),
        pytest.param(unread, (0, 0, 1), id="client does not read"),
    ],
)
def test_each_request_ends_in_one_way(act: Ends, expected: tuple[int, int, int]) -> None:
    """By what its client got; afterwards nothing changes it."""
    room = Room(num_endpoints=2)
    client, wire = room.client()
    client.data_received(request(BODY))
    act(room, client, wire)
    assert ends(room) == expected
    client.connection_lost(None)

    assert ends(room) == expected
    assert room.num_in_flight == 0


def test_without_an_engine_the_client_is_failed() -> None:
    """It got 503, and no engine was asked."""
    room = Room()
    room.endpoints[0].state = EndpointState.DOWN
    room.parts.fleet.changed()
    room.client()[0].data_received(request(BODY))

    assert ends(room) == (0, 1, 0)


def test_a_client_that_stops_within_its_body_has_left() -> None:
    """It did not end what it began."""
    room = Room(relay={"gathered_bytes_max": 1024})
    client, _ = room.client()
    client.data_received(request(b"x" * 5000)[:-50])
    room.clock.at_s += room.relay.settings.body_silence_s + 1
    room.relay.look()
    client.connection_lost(None)

    assert ends(room) == (0, 0, 1)


def test_who_waits_for_a_turn_and_leaves_has_left() -> None:
    """What the gate refuses is counted as refused instead."""
    room = Room(limits={"in_flight_max": 1, "queue_max": 1})
    first, waiting, refused = (room.client()[0] for _ in range(3))
    for client in (first, waiting, refused):
        client.data_received(request(BODY))
    waiting.connection_lost(None)

    assert ends(room) == (0, 0, 1)
    assert sum(room.parts.gate.num_refused.values()) == 1


def test_the_router_s_own_pages_are_no_requests() -> None:
    """Health checks of a load balancer would drown everything else."""
    room = Room()
    client, _ = room.client()
    client.data_received(request(b"", line="GET /health HTTP/1.1"))
    client.data_received(request(b"", line="GET /nowhere HTTP/1.1"))

    assert ends(room) == (0, 0, 0)
