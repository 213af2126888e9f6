"""Hostile bytes from a client or an engine: refused or read as llhttp reads them, never leaked.

Engines read HTTP with llhttp (through httptools). Whatever the relay accepts from a client and
passes on, llhttp must read as the same one request, with the same body.
"""

from itertools import pairwise

import httptools
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.router.relay.framing import FramingError
from kvkeep.router.relay.reader import RequestReader
from tests.unit.router.relay.wires import STREAM, Room, chunked, request, response, split

SEEDS = [
    request(b'{"a": 1}', "X-A: b"),
    request(b"", line="GET /v1/x HTTP/1.1"),
    request(b"{}", "Connection: keep-alive", "Expect: 100-continue"),
    request(b"{}", line="POST http://b/v1/x HTTP/1.1"),
    b"POST /v1/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    + chunked([b"ab", b"c"]),
    b"POST /v1/x HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc",
]
DANGEROUS = [
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b",", b";", b"0", b"5", b"\x0b", b"\xff"),
    *(b"Content-Length: 3\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n"),
    *(b"Transfer-Encoding: identity\r\n", b"Host: b\r\n", b"Connection: close\r\n", b"0\r\n\r\n"),
    *(
        b"Connection: transfer-encoding\r\n",
        b"Upgrade: h2c\r\n",
        b"HTTP/1.0",
        b"GET /x HTTP/1.1\r\n",
    ),
]
MUTATIONS = st.lists(
    st.tuples(
        st.integers(0, 400),
        st.sampled_from(["insert", "delete", "replace", "double"]),
        st.one_of(st.sampled_from(DANGEROUS), st.binary(min_size=1, max_size=4)),
    ),
    max_size=4,
)


def mutated(data: bytes, mutations: list[tuple[int, str, bytes]]) -> bytes:
    """The data with changes at some places."""
    for place, kind, piece in mutations:
        at = place % (len(data) + 1)
        match kind:
            case "insert":
                data = data[:at] + piece + data[at:]
            case "delete":
                data = data[:at] + data[at + len(piece) :]
            case "replace":
                data = data[:at] + piece + data[at + len(piece) :]
            case _:
                data = data[:at] + data[max(0, at - 20) : at] + data[at:]
    return data


class Seen:
    """What llhttp makes of bytes."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.body = b""
        self.num_begun = 0

    def on_message_begin(self) -> None:
        """One more begins."""
        self.num_begun += 1
        self.body = b""

    def on_body(self, body: bytes) -> None:
        """A piece of its body."""
        self.body += body

    def on_message_complete(self) -> None:
        """It is whole."""
        self.requests.append(self.body)


@settings(max_examples=200, deadline=None)
@given(seeds=st.lists(st.sampled_from(SEEDS), min_size=1, max_size=2), mutations=MUTATIONS)
def test_what_is_passed_on_reads_alike(
    seeds: list[bytes], mutations: list[tuple[int, str, bytes]]
) -> None:
    """Each request that the relay finds is exactly one to an engine, with that body."""
    reader = RequestReader(1 << 20, 1 << 20)
    reader.feed(mutated(b"".join(seeds), mutations))
    while True:
        try:
            found = reader.take()
        except FramingError:
            return
        if found is None:
            return
        seen = Seen()
        parser = httptools.HttpRequestParser(seen)
        forwarded = found.head.forwarded
        if b"transfer-encoding" in found.head.raw.lower():
            forwarded += b"Content-Length: %d\r\n" % len(found.body)
        parser.feed_data(forwarded + b"\r\n" + found.body)
        assert (seen.requests, seen.num_begun) == ([found.body], 1)
        assert parser.get_method() == found.head.method
        assert not parser.should_upgrade()


@settings(max_examples=100, deadline=None)
@given(
    seeds=st.lists(st.sampled_from(SEEDS), min_size=1, max_size=3),
    mutations=MUTATIONS,
    cuts=st.lists(st.integers(1, 300), max_size=5),
)
def test_a_hostile_client_leaks_nothing(
    seeds: list[bytes], mutations: list[tuple[int, str, bytes]], cuts: list[int]
) -> None:
    """Whatever it sends, and wherever it leaves, nothing runs on and no counter is off."""
    room = Room()
    client, wire = room.client()
    data = mutated(b"".join(seeds), mutations)
    edges = [0, *sorted({at for at in cuts if at < len(data)}), len(data)]
    for a, b in pairwise(edges):
        client.data_received(data[a:b])
        for connection, _ in list(room.busy()):
            connection.data_received(response())
    client.connection_lost(None)

    assert list(room.busy()) == []
    assert room.num_in_flight == 0
    assert room.relay.gate.num_running == 0
    assert room.relay.clients == set()
    assert wire.written == b"" or wire.written.startswith(b"HTTP/1.1 ")


@settings(max_examples=100, deadline=None)
@given(
    seed=st.sampled_from([response(b"abc"), STREAM + chunked([b"data: 1\n\n", b"data: 2\n\n"])]),
    mutations=MUTATIONS,
    cuts=st.lists(st.integers(1, 200), max_size=4),
    is_lost=st.booleans(),
)
def test_a_hostile_engine_leaks_nothing(
    seed: bytes, mutations: list[tuple[int, str, bytes]], cuts: list[int], is_lost: bool
) -> None:
    """The client gets a response or an error, and its connection says which."""
    room = Room()
    client, wire = room.client()
    client.data_received(request())
    connection, upstream = room.upstream()
    connection.is_reused = False
    data = mutated(seed, mutations)
    edges = [0, *sorted({at for at in cuts if at < len(data)}), len(data)]
    for a, b in pairwise(edges):
        if upstream.is_open:
            connection.data_received(data[a:b])
    if is_lost and upstream.is_open:
        connection.connection_lost(ConnectionResetError())
    if room.num_in_flight:
        client.connection_lost(None)

    assert room.num_in_flight == 0
    assert list(room.busy()) == []
    if wire.written:
        head, _ = split(bytes(wire.written))
        assert httptools_status(bytes(wire.written)) == int(head[9:12])


def httptools_status(data: bytes) -> int:
    """The status as llhttp reads it; what was written so far must be legal."""
    seen = Seen()
    parser = httptools.HttpResponseParser(seen)
    parser.feed_data(data)
    return parser.get_status_code()
