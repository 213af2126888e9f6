"""Whatever is sent, and however the network cuts it, what arrives is what was sent."""

import json
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.router.relay.wires import (
    STREAM,
    Room,
    chunked,
    request,
    response,
    split,
    unchunked,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
BODIES = st.one_of(
    JSON.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.just(b'{"model": "a", "model": "b", "x": 1, "x": 1}'),
    st.binary(max_size=3000),
)
PIECES = st.lists(st.binary(min_size=1, max_size=300), max_size=8)
EVENTS = st.lists(
    st.text(max_size=40).map(lambda t: f"data: {json.dumps(t)}\n\n".encode()), max_size=8
)
LARGE_BODIES = st.tuples(st.binary(min_size=1, max_size=40), st.integers(100, 400)).map(
    lambda pair: (pair[0] * 2000)[: 2000 + 40 * pair[1]]
)
CUTS = st.lists(st.integers(min_value=0, max_value=4000), max_size=12)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    """Data in pieces, as a network might deliver them."""
    edges = [0, *sorted({at for at in cuts if 0 < at < len(data)}), len(data)]
    return [data[a:b] for a, b in pairwise(edges) if a < b]


@settings(max_examples=50, deadline=None)
@given(bodies=st.lists(BODIES, min_size=1, max_size=3), cuts=CUTS, is_chunked=st.booleans())
def test_requests_arrive_as_they_were_sent(
    bodies: list[bytes], cuts: list[int], is_chunked: bool
) -> None:
    """Requests behind each other on one connection, in any pieces, with a length or in chunks."""
    room = Room()
    client, wire = room.client()
    sent = b""
    for body in bodies:
        if is_chunked:
            pieces = [body[at : at + 100] for at in range(0, len(body), 100)]
            sent += (
                b"POST /v1/x HTTP/1.1\r\nhOsT:  a\r\nX-Z: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
                + chunked(pieces)
            )
        else:
            sent += request(body, "x-B: 1", "X-A:2")
    arrived = []
    for piece in cut(sent, cuts):
        client.data_received(piece)
        for connection, upstream in list(room.busy()):
            while connection.listener is not None:
                head, got = split(bytes(upstream.written))
                arrived.append((head, got))
                upstream.written.clear()
                connection.data_received(response())

    assert [body for _, body in arrived] == bodies
    for (head, _), body in zip(arrived, bodies, strict=True):
        assert f"Content-Length: {len(body)}".encode() in head
        assert b"Transfer-Encoding" not in head
        assert (b"hOsT:  a\r\nX-Z: 1" if is_chunked else b"Host: a\r\nx-B: 1\r\nX-A:2") in head
    assert wire.is_open
    assert wire.written.count(b"HTTP/1.1 200 OK") == len(bodies)
    assert room.num_in_flight == 0


@settings(max_examples=50, deadline=None)
@given(body=BODIES, cuts=CUTS)
def test_a_response_with_a_length_arrives_as_it_was_sent(body: bytes, cuts: list[int]) -> None:
    """Its fields too, in their order, with one more that says how it was routed."""
    room = Room()
    client, wire = room.client()
    client.data_received(request())
    connection, upstream = room.upstream()
    for piece in cut(response(body, "X-a:  1", "x-A: 2"), cuts):
        connection.data_received(piece)
    head, got = split(bytes(wire.written))

    assert got == body
    assert head.startswith(b"HTTP/1.1 200 OK\r\nX-a:  1\r\nx-A: 2\r\ncontent-length: ")
    assert head.endswith(b"X-Kvkeep-Route: 127.0.0.1:1; round_robin; its turn")
    assert wire.is_open
    assert upstream.is_open
    assert connection.listener is None


@settings(max_examples=50, deadline=None)
@given(pieces=st.one_of(PIECES, EVENTS), cuts=CUTS, is_stream=st.booleans())
def test_a_response_in_chunks_arrives_as_it_was_sent(
    pieces: list[bytes], cuts: list[int], is_stream: bool
) -> None:
    """A stream of events or not; and the client always stands between two chunks."""
    room = Room()
    client, wire = room.client()
    client.data_received(request())
    connection, upstream = room.upstream()
    head = STREAM if is_stream else b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    for piece in cut(head + chunked(pieces), cuts):
        connection.data_received(piece)
        got = split(bytes(wire.written))[1]
        assert not got or got.endswith(b"\r\n")
    head, got = split(bytes(wire.written))

    assert unchunked(got) == b"".join(pieces)
    assert head.lower().count(b"transfer-encoding: chunked") == 1
    assert wire.is_open
    assert upstream.is_open


@settings(max_examples=50, deadline=None)
@given(pieces=PIECES, cuts=CUTS, is_old=st.booleans())
def test_a_response_that_ends_with_its_connection_arrives_whole(
    pieces: list[bytes], cuts: list[int], is_old: bool
) -> None:
    """A client of HTTP/1.1 gets it in chunks, so that its end is certain; an older one as it is."""
    room = Room()
    client, wire = room.client()
    client.data_received(request(line=f"POST /v1/x HTTP/1.{0 if is_old else 1}"))
    connection, _ = room.upstream()
    for piece in cut(b"HTTP/1.1 200 OK\r\nx: y\r\n\r\n" + b"".join(pieces), cuts):
        connection.data_received(piece)
    connection.connection_lost(None)
    head, got = split(bytes(wire.written))

    assert (got if is_old else unchunked(got)) == b"".join(pieces)
    assert wire.is_open != is_old
    assert (b"Connection: close" in head) == is_old


@settings(max_examples=50, deadline=None)
@given(body=LARGE_BODIES, cuts=CUTS, is_chunked=st.booleans())
def test_a_body_too_large_to_be_gathered_arrives_as_it_was_sent(
    body: bytes, cuts: list[int], is_chunked: bool
) -> None:
    """It goes on in pieces, framed anew."""
    room = Room(relay={"gathered_bytes_max": 1024})
    client, wire = room.client()
    pieces = [body[at : at + 700] for at in range(0, len(body), 700)]
    head = b"POST /v1/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    sent = head + chunked(pieces) if is_chunked else request(body)
    for piece in cut(sent, cuts):
        client.data_received(piece)
    connection, upstream = room.upstream()
    got_head, got = split(bytes(upstream.written))
    connection.data_received(response())

    # What was there whole when it was routed has a length after all.
    assert (unchunked(got) if b"Transfer-Encoding" in got_head else got) == body
    assert wire.is_open
    assert upstream.is_open
