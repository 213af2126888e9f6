"""Hostile bytes from a client or an engine: refused or read as llhttp reads them, never leaked.

Engines read HTTP with llhttp (through httptools). Whatever the relay accepts from a client and
passes on, llhttp must read as the same one request, with the same body.
"""

import contextlib
import socket
from itertools import pairwise

import httptools
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.router.relay import plain
from kvkeep.router.relay.framing import (
    ChunkScanner,
    FramingError,
    RequestHead,
    ResponseHead,
    parse_request,
    parse_response,
)
from kvkeep.router.relay.plain import Pump, plain_request, plain_response, whole_chunks
from kvkeep.router.relay.reader import RequestReader
from kvkeep.router.usage import find_tokens
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
        parser.feed_data(found.wire or found.framed())
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


RESPONSES = [
    response(b"abc", "Content-Type: application/json", "X-Odd:  a "),
    response(b"", line="HTTP/1.1 503 Service Unavailable"),
    response(b"abc", line="HTTP/1.1 200"),
    STREAM + chunked([b"data: 1\n\n"]),
]


@settings(max_examples=400, deadline=None)
@given(seed=st.sampled_from(SEEDS), mutations=MUTATIONS)
def test_a_plain_request_is_read_as_in_python(
    seed: bytes, mutations: list[tuple[int, str, bytes]]
) -> None:
    """What the compiled part takes for plain is that request, to be passed on unchanged."""
    data = mutated(seed, mutations)
    found = plain_request(data)
    if found is None:
        return
    method, target, length, end = found
    head = data[:end]

    assert end == data.index(b"\r\n\r\n") + 4
    assert parse_request(head) == RequestHead(
        method, target, length, True, False, False, head, head[:-2], True
    )


@settings(max_examples=400, deadline=None)
@given(seed=st.sampled_from(RESPONSES), mutations=MUTATIONS)
def test_a_plain_response_is_read_as_in_python(
    seed: bytes, mutations: list[tuple[int, str, bytes]]
) -> None:
    """Likewise of an engine."""
    data = mutated(seed, mutations)
    found = plain_response(data)
    if found is None:
        return
    status, length, is_event_stream, end = found

    assert end == data.index(b"\r\n\r\n") + 4
    assert parse_response(data[:end], is_for_head=False) == ResponseHead(
        status, length, True, is_event_stream, data[: end - 2]
    )


def test_most_heads_are_plain() -> None:
    """What clients and engines really send is not left to Python."""
    assert plain_request(SEEDS[0]) == (b"POST", b"/v1/completions", 8, SEEDS[0].index(b"{"))
    assert plain_request(request(b"{}", "Connection: keep-alive")) is not None
    assert [plain_response(each) is not None for each in RESPONSES] == [True] * 4
    assert plain_response(STREAM) == (200, -2, True, len(STREAM))


USAGE = (
    b'"usage": {"prompt_tokens": 12, "completion_tokens" : 3,\n'
    b'"input_tokens":\v4, "output_tokens": 123456789012, "x": {"cached_tokens": 0}}'
)
USAGE_MUTATIONS = st.lists(
    st.tuples(
        st.integers(0, 400),
        st.sampled_from(["insert", "delete", "replace", "double"]),
        st.sampled_from([b'"', b":", b" ", b"\x1c", b"0", b"99", b"_", b"a", b"}", b"\xff", b"-1"]),
    ),
    max_size=6,
)


@settings(max_examples=400, deadline=None)
@given(mutations=USAGE_MUTATIONS, end=st.integers(0, 200))
def test_tokens_are_found_as_in_python(mutations: list[tuple[int, str, bytes]], end: int) -> None:
    """Wherever the object is cut or damaged."""
    data = mutated(USAGE, mutations)[:end]

    assert plain.find_tokens(data) == find_tokens(data)


PIECES = st.lists(
    st.one_of(
        st.sampled_from([b"data: 1\n\n", b"x\n", b"ab", b": ping\r\n\r\n"]).map(
            lambda payload: b"%x\r\n%b\r\n" % (len(payload), payload)
        ),
        st.sampled_from([b"0\r\n\r\n", b"2;x\r\na\n\r\n", b"02\r\na\n\r\n", b"2\r\na\n\n"]),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
).map(b"".join)


@settings(max_examples=400, deadline=None)
@given(data=PIECES, mutations=MUTATIONS, is_event_stream=st.booleans())
def test_whole_chunks_are_whole_to_the_scanner(
    data: bytes, mutations: list[tuple[int, str, bytes]], is_event_stream: bool
) -> None:
    """What is passed on unread leaves the reader between two chunks, and a client between lines."""
    data = mutated(data, mutations)
    if whole_chunks(data, is_event_stream):
        scanner = ChunkScanner()
        payload = b"".join(scanner.feed(data))

        assert scanner.is_between
        assert not is_event_stream or payload.endswith((b"\r", b"\n"))


@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(PIECES, min_size=1, max_size=12), is_event_stream=st.booleans())
def test_a_pump_passes_on_all_or_tells(pieces: list[bytes], is_event_stream: bool) -> None:
    """Of every piece either the client has all, or whoever reads on: nothing is lost or doubled."""
    told: list[tuple[bytes, bytes, int]] = []
    (engine, ours), (client, theirs) = socket.socketpair(), socket.socketpair()
    with engine, ours, client, theirs:
        pump = Pump(
            ours.fileno(), theirs.fileno(), is_event_stream, lambda *each: told.append(each)
        )
        client.setblocking(False)
        passed = b""
        for piece in pieces:
            engine.sendall(piece)
            told.clear()
            pump()
            if whole_chunks(piece, is_event_stream):
                passed += piece
                assert client.recv(1 << 16) == piece
                assert not told
            else:
                assert told == [(b"", piece, 0)]
                with contextlib.suppress(BlockingIOError):
                    raise AssertionError(client.recv(1))
        pump()
        assert (pump.num_bytes, pump.tail) == (len(passed), passed[-4096:])
        engine.close()
        told.clear()
        pump()

    assert told == [(b"", b"", 0)]


def test_a_pump_keeps_what_finds_no_room() -> None:
    """The client's socket is full: what it did not take is told, and nothing of it is lost."""
    told: list[tuple[bytes, bytes, int]] = []
    chunk = b"4e20\r\n" + b"x" * 20_000 + b"\r\n"
    (engine, ours), (client, theirs) = socket.socketpair(), socket.socketpair()
    with engine, ours, client, theirs:
        theirs.setblocking(False)
        pump = Pump(ours.fileno(), theirs.fileno(), False, lambda *each: told.append(each))
        num_sent = 0
        while not told:
            engine.sendall(chunk)
            num_sent += 1
            pump()
        client.setblocking(False)
        got = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                got += client.recv(1 << 16)

    assert got + told[0][0] == chunk * num_sent
    assert told[0][1:] == (b"", 0)
    assert pump.tail == (chunk * 2)[-len(pump.tail) :]


def test_a_pump_tells_of_an_error() -> None:
    """A socket that is none can't be read; who was told goes on, and may be deaf by then."""
    told: list[tuple[bytes, bytes, int]] = []
    client, theirs = socket.socketpair()
    with client, theirs:
        Pump(-1, theirs.fileno(), True, lambda *each: told.append(each))()

    assert [(unsent, unread) for unsent, unread, _ in told] == [(b"", b"")]
    assert told[0][2] > 0
