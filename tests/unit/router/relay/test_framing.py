"""What is refused, and what is passed on as it came."""

import pytest

from kvkeep.router.relay.framing import (
    CHUNKED,
    FIELDS_MAX,
    UNTIL_CLOSE,
    ChunkScanner,
    FramingError,
    parse_request,
    parse_response,
)

LINE = b"POST /v1/completions HTTP/1.1\r\n"

REFUSED = {
    "both lengths": (b"Host: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n", 400),
    "both lengths, the other way round": (
        b"Host: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        400,
    ),
    "two lengths": (b"Host: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n", 400),
    "two lengths, the first nothing": (
        b"Host: a\r\nContent-Length: 0\r\nContent-Length: 6\r\n",
        400,
    ),
    "two equal lengths": (b"Host: a\r\nContent-Length: 5\r\nContent-Length: 5\r\n", 400),
    "a list of lengths": (b"Host: a\r\nContent-Length: 5, 5\r\n", 400),
    "a signed length": (b"Host: a\r\nContent-Length: +5\r\n", 400),
    "a negative length": (b"Host: a\r\nContent-Length: -5\r\n", 400),
    "a hexadecimal length": (b"Host: a\r\nContent-Length: 0x5\r\n", 400),
    "an underlined length": (b"Host: a\r\nContent-Length: 1_0\r\n", 400),
    "an empty length": (b"Host: a\r\nContent-Length:\r\n", 400),
    "a huge length": (b"Host: a\r\nContent-Length: 99999999999999999999\r\n", 400),
    "an unknown coding": (b"Host: a\r\nTransfer-Encoding: gzip\r\n", 501),
    "two codings": (b"Host: a\r\nTransfer-Encoding: gzip, chunked\r\n", 501),
    "chunked twice": (
        b"Host: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        501,
    ),
    "a coding with a tab": (b"Host: a\r\nTransfer-Encoding: \x0bchunked\r\n", 400),
    "an almost chunked coding": (b"Host: a\r\nTransfer-Encoding: xchunked\r\n", 501),
    "space before the colon": (b"Host: a\r\nContent-Length : 5\r\n", 400),
    "a folded line": (b"Host: a\r\nX-A: b\r\n c\r\n", 400),
    "a folded first line": (b" X-A: b\r\nHost: a\r\n", 400),
    "a bare line feed": (b"Host: a\nX-A: b\r\n", 400),
    "a bare carriage return": (b"Host: a\rX-A: b\r\n", 400),
    "a zero byte": (b"Host: a\r\nX-A: b\0c\r\n", 400),
    "a control character": (b"Host: a\r\nX-A: b\x01c\r\n", 400),
    "a delete character": (b"Host: a\r\nX-A: b\x7fc\r\n", 400),
    "a name that is none": (b"Host: a\r\nX(A): b\r\n", 400),
    "an empty name": (b"Host: a\r\n: b\r\n", 400),
    "a line without a colon": (b"Host: a\r\nX-A\r\n", 400),
    "no host": (b"X-A: b\r\n", 400),
    "two hosts": (b"Host: a\r\nhost: b\r\n", 400),
    "a websocket": (b"Host: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n", 501),
    "another expectation": (b"Host: a\r\nExpect: 200-ok\r\n", 417),
    "too many fields": (b"Host: a\r\n" + b"X: y\r\n" * FIELDS_MAX, 431),
}

REFUSED_LINES = {
    "no version": (b"GET /v1/models\r\n", 400),
    "a newer version": (b"GET /v1/models HTTP/2.0\r\n", 505),
    "an older version": (b"GET /v1/models HTTP/0.9\r\n", 505),
    "two spaces": (b"GET  /v1/models HTTP/1.1\r\n", 400),
    "a tab": (b"GET\t/v1/models HTTP/1.1\r\n", 400),
    "a space in the target": (b"GET /v1/ models HTTP/1.1\r\n", 400),
    "a letter that is none": (b"GET /v1/\xe4 HTTP/1.1\r\n", 400),
    "a bare line feed": (b"GET /v1/models HTTP/1.1\n", 400),
    "a tunnel": (b"CONNECT a:80 HTTP/1.1\r\n", 501),
    "an unknown method": (b"XPOST /v1/x HTTP/1.1\r\n", 501),
    "a small method": (b"post /v1/x HTTP/1.1\r\n", 501),
    "no path": (b"GET v1/models HTTP/1.1\r\n", 400),
    "a star": (b"GET * HTTP/1.1\r\n", 400),
    "another scheme": (b"GET ftp://a/v1/models HTTP/1.1\r\n", 400),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_others_may_read_otherwise_is_refused(case: str) -> None:
    """Whatever has smuggled requests or is no HTTP gets a status that says so."""
    fields, status = REFUSED[case]
    with pytest.raises(FramingError) as caught:
        parse_request(LINE + fields + b"\r\n")

    assert caught.value.status == status


@pytest.mark.parametrize("case", REFUSED_LINES)
def test_a_malformed_request_line_is_refused(case: str) -> None:
    """A line is method, target and version with one space between them."""
    line, status = REFUSED_LINES[case]
    with pytest.raises(FramingError) as caught:
        parse_request(line + b"Host: a\r\n\r\n")

    assert caught.value.status == status


def test_a_plain_head_is_passed_on_byte_for_byte() -> None:
    """Order, case and inner space of fields are the client's."""
    fields = b"hOST:a\r\nX-B:  two  \r\nX-A: one\r\nx-b: again\r\nContent-Length: 12\r\n"
    head = parse_request(LINE + fields + b"\r\n")

    assert head.forwarded == LINE + fields
    assert (head.length, head.is_persistent) == (12, True)
    assert head.field(b"x-b") == b"two"


def test_what_concerns_one_connection_stays_there() -> None:
    """Hop-by-hop fields and those that Connection names are left out, and nothing else."""
    fields = (
        b"Host: a\r\nConnection: close, X-Mine\r\nKeep-Alive: timeout=5\r\nX-Mine: 1\r\n"
        b"TE: trailers\r\nX-Other: 2\r\nProxy-Connection: x\r\nContent-Length: 2\r\n"
    )
    head = parse_request(LINE + fields + b"\r\n")

    assert head.forwarded == LINE + b"Host: a\r\nX-Other: 2\r\nContent-Length: 2\r\n"
    assert not head.is_persistent


def test_connection_cannot_take_away_what_frames_the_message() -> None:
    """A client that names Content-Length as its own still sends a body of that length."""
    fields = b"Host: a\r\nConnection: content-length, host\r\nContent-Length: 2\r\n"
    head = parse_request(LINE + fields + b"\r\n")

    assert head.forwarded == LINE + b"Host: a\r\nContent-Length: 2\r\n"
    assert head.length == 2


def test_an_offer_of_h2c_is_left_unanswered() -> None:
    """Java's client offers HTTP/2 with its first request, and goes on without."""
    fields = (
        b"Host: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"
    )
    head = parse_request(LINE + fields + b"\r\n")

    assert head.forwarded == LINE + b"Host: a\r\n"
    assert head.is_persistent


def test_an_absolute_target_becomes_a_path() -> None:
    """The authority in the target wins over Host, as RFC 9112 asks of every server."""
    head = parse_request(b"GET http://b:80/v1/x?y=1 HTTP/1.1\r\nHost: a\r\nX: 1\r\n\r\n")

    assert head.target == b"/v1/x?y=1"
    assert head.forwarded == b"GET /v1/x?y=1 HTTP/1.1\r\nHost: b:80\r\nX: 1\r\n"


def test_http_1_0_is_passed_on_as_1_1() -> None:
    """The engine's connection stays open; the client's does not."""
    head = parse_request(b"GET /v1/x HTTP/1.0\r\nX: 1\r\n\r\n")

    assert head.forwarded == b"GET /v1/x HTTP/1.1\r\nHost: localhost\r\nX: 1\r\n"
    assert (head.is_old, head.is_persistent) == (True, False)


def test_a_chunked_body_loses_its_coding_on_the_way() -> None:
    """What frames the body towards the engine is the relay's to say."""
    head = parse_request(LINE + b"Host: a\r\nTransfer-Encoding: chunked\r\nX: 1\r\n\r\n")

    assert head.length == CHUNKED
    assert head.forwarded == LINE + b"Host: a\r\nX: 1\r\n"


def test_expect_is_answered_here() -> None:
    """The engine is asked when the body is there, so it is not asked for leave."""
    head = parse_request(LINE + b"Host: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")

    assert head.is_waiting
    assert head.forwarded == LINE + b"Host: a\r\nContent-Length: 2\r\n"


@pytest.mark.parametrize(
    ("head", "length", "is_persistent"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", 5, True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 0, True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", CHUNKED, True),
        (b"HTTP/1.1 200 OK\r\n\r\n", UNTIL_CLOSE, False),
        (b"HTTP/1.1 200\r\ncontent-length: 5\r\n\r\n", 5, True),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\n", 5, False),
        (b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\n", 5, False),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 0, True),
        (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n", 0, True),
        (b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n", 0, True),
    ],
)
def test_the_end_of_a_response_is_known(head: bytes, length: int, is_persistent: bool) -> None:
    """Length, chunks, nothing, or the end of the connection."""
    found = parse_response(head, is_for_head=False)

    assert (found.length, found.status) == (length, int(head[9:12]))
    if length != UNTIL_CLOSE and found.status not in (204, 304, 103):
        assert found.is_persistent == is_persistent


def test_a_response_to_head_has_no_body() -> None:
    """The length it announces is that of what GET would have got."""
    found = parse_response(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", is_for_head=True)

    assert found.length == 0
    assert b"content-length: 5" in found.forwarded


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\ncontent-length: 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: five\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9999999999999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked, chunked\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: a\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\nx: a\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
    ],
)
def test_a_response_of_uncertain_length_is_refused(head: bytes) -> None:
    """Nothing of it reaches the client, who would read it in his own way."""
    with pytest.raises(FramingError) as caught:
        parse_response(head, is_for_head=False)

    assert caught.value.status == 502


@pytest.mark.parametrize(
    "data",
    [
        b"5\nhello\r\n0\r\n\r\n",
        b"5\r\nhelloX\r\n0\r\n\r\n",
        b"5\r\nhello\n0\r\n\r\n",
        b"+5\r\nhello\r\n0\r\n\r\n",
        b"0x5\r\nhello\r\n0\r\n\r\n",
        b"-1\r\nhello\r\n",
        b" 5\r\nhello\r\n",
        b"\r\nhello\r\n",
        b"g\r\n",
        b"5;a\0b\r\nhello\r\n",
        b"5;a\nb\r\nhello\r\n",
        b"fffffffffffffffff\r\n",
        b"5;" + b"a" * 2000 + b"\r\nhello\r\n",
        b"5\r\nhello\r\n0\r\nbad trailer\r\n\r\n",
        b"5\r\nhello\r\n0\r\n\n",
        b"0\r\n" + b"X-A: b\r\n" * 2000 + b"\r\n",
    ],
)
def test_a_malformed_chunk_is_refused(data: bytes) -> None:
    """Sizes, extensions, line ends and trailers are as RFC 9112 has them, or the end."""
    with pytest.raises(FramingError):
        ChunkScanner().feed(data)


def test_extensions_and_trailers_are_read_over() -> None:
    """They are legal, and of no use to an engine."""
    scanner = ChunkScanner()
    data = b"5;name=value\r\nhello\r\n1 ; x\r\n!\r\n0\r\nX-A: b\r\n\r\nGET"

    assert b"".join(scanner.feed(data)) == b"hello!"
    assert scanner.is_done
    assert data[scanner.end :] == b"GET"
