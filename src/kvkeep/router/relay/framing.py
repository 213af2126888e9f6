"""Where an HTTP/1.1 message begins and ends, and what is refused: bytes in, values out, no I/O.

Two programs that disagree about where a request ends let one client write into another's
connection. So everything that RFC 9112 leaves to a recipient's good will is refused here: both
lengths, several lengths, folded lines, bare CR or LF, control characters, unknown transfer codings.
What is left reads alike everywhere; the tests compare with llhttp, the parser in the engines.

A head is one regular expression over its bytes, and is passed on as the bytes that came, less the
lines that concern one connection only (RFC 9110, 7.6.1).
"""

import re
from typing import Final

import msgspec

from kvkeep.router.relay.plain import plain_request, plain_response, whole_chunks

HEAD_BYTES_MAX: Final = 64 << 10
"""Of a request or response head; engines refuse more as well."""
FIELDS_MAX: Final = 128
CHUNK_LINE_BYTES_MAX: Final = 1024
"""Of a chunk's size with its extensions, and of each trailer line."""
TRAILER_BYTES_MAX: Final = 8 << 10
UNTIL_CLOSE: Final = -1
"""As a length: the body ends with the connection."""
DIGITS_MAX: Final = 19
"""A length has fewer."""
CHUNKED: Final = -2
"""As a length: the body is in chunks."""

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_FIELDS = rb"(?:" + _TOKEN + rb":[\t\x20-\x7e\x80-\xff]*+\r\n)*+\r\n"
_REQUEST = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e]++) HTTP/([0-9]\.[0-9])\r\n" + _FIELDS)
_RESPONSE = re.compile(
    rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [\t\x20-\x7e\x80-\xff]*+)?\r\n" + _FIELDS
)
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/?#@\s]++)([/?].*+)?")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*+)?\r\n")
_PLAIN_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})\r\n")
_TRAILER_LINE = re.compile(_TOKEN + rb":[\t\x20-\x7e\x80-\xff]*+\r\n")

_ENDS_WITH_HOP = (
    rb"connection|keep-alive|proxy-connection|te|trailer|transfer-encoding|upgrade|http2-settings"
)
_NOTED_OF_REQUEST = re.compile(
    rb"\r\n(content-length|host|expect|" + _ENDS_WITH_HOP + rb"):[ \t]*+([^\r]*+)"
)
_NOTED_OF_RESPONSE = re.compile(
    rb"\r\n(content-length|content-type|" + _ENDS_WITH_HOP + rb"):[ \t]*+([^\r]*+)"
)
"""Over a head in lower case: the few fields that decide anything here."""
_KEPT_ANYWAY = frozenset({b"content-length", b"transfer-encoding", b"host", b"content-type"})
"""What a Connection field can't take away: the message would mean something else without."""
_NOT_HOP_BY_HOP = frozenset({b"content-length", b"transfer-encoding", b"host", b"expect"})
"""Noted fields that are dealt with elsewhere."""

_METHODS: Final = frozenset({b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"})
"""CONNECT and TRACE are for intermediaries; others an engine's parser would refuse."""
_SLASH: Final = ord("/")
_WITHOUT_BODY: Final = (204, 304)

Noted = list[tuple[bytes, bytes]]
"""Names and values, in lower case, of the fields that decide anything."""


class FramingError(Exception):
    """Bytes that are not HTTP as the relay accepts it; the connection can't be trusted further."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        """What a client is told; of a response it is 502."""
        self.message = message


class RequestHead(msgspec.Struct):
    """The head of a request."""

    method: bytes
    target: bytes
    """In origin form, whatever the client wrote."""
    length: int
    """Of the body in bytes, or ``CHUNKED``."""
    is_persistent: bool
    """Whether the client lets the connection stay open."""
    is_old: bool
    """HTTP/1.0: the response can't come in chunks."""
    is_waiting: bool
    """Whether the client waits for ``100 Continue``."""
    raw: bytes
    """The head as it came."""
    forwarded: bytes
    """What an engine gets, without the empty line and without a line for a chunked body."""
    is_unchanged: bool = False
    """Whether that is the head as it came."""

    def field(self, name: bytes) -> bytes | None:
        """The value of the first field of this lower-case name; None if there is none."""
        return find_field(self.raw, name)


class ResponseHead(msgspec.Struct):
    """The head of a response."""

    status: int
    length: int
    """Of the body in bytes, 0 where there can't be one; ``CHUNKED`` or ``UNTIL_CLOSE``."""
    is_persistent: bool
    """Whether the connection can serve another request."""
    is_event_stream: bool
    forwarded: bytes
    """What the client gets, without the empty line; with Transfer-Encoding if there was one."""

    @property
    def retry_after_s(self) -> int | None:
        """When it says to ask again; None if it does not, or names a date."""
        value = find_field(self.forwarded, b"retry-after")
        return int(value) if value is not None and value.isdigit() and len(value) < 10 else None


def find_field(head: bytes, name: bytes) -> bytes | None:
    """The value of the first field of this lower-case name; None if there is none."""
    at = head.lower().find(b"\r\n" + name + b":")
    if at < 0:
        return None
    begin = at + len(name) + 3
    return head[begin : head.index(b"\r\n", begin)].strip(b" \t")


def without_fields(head: bytes, names: frozenset[bytes]) -> bytes:
    """A head less the lines of these lower-case names; every other byte stays where it was."""
    first, *lines = head.split(b"\r\n")
    kept = [line for line in lines if line.partition(b":")[0].lower() not in names]
    return b"\r\n".join([first, *kept])


def split_request(data: bytes) -> tuple[RequestHead, int] | None:
    """The head that data begins with, and where it ends; None while it is not whole.

    Raises:
        FramingError: It is refused; the status says why.
    """
    plain = None if plain_request is None else plain_request(data)
    if plain is not None:
        method, target, length, end = plain
        head, forwarded = data[:end], data[: end - 2]
        return RequestHead(method, target, length, True, False, False, head, forwarded, True), end
    end = data.find(b"\r\n\r\n") + 4
    if end == 3:
        return None
    if end > HEAD_BYTES_MAX:
        raise FramingError(431, f"the request head has more than {HEAD_BYTES_MAX} bytes")
    return parse_request(data[:end]), end


def parse_request(head: bytes) -> RequestHead:
    """Understand a request head.

    Args:
        head: Up to and with the empty line.

    Raises:
        FramingError: It is refused; the status says why.
    """
    match = _REQUEST.fullmatch(head)
    if match is None:
        raise _refused_request(head)
    method, target, version = match.groups()
    if method not in _METHODS:
        raise FramingError(501, "the method is none that an engine knows")
    length, num_hosts = -1, 0
    is_plain = version == b"1.1" and target[0] == _SLASH
    noted = _NOTED_OF_REQUEST.findall(head.lower())
    for name, value in noted:
        if name == b"content-length":
            # What is there twice or is no number goes where it is refused.
            is_plain = is_plain and length < 0 and value.isdigit() and len(value) < DIGITS_MAX
            length = int(value) if is_plain else 0
        elif name == b"host":
            num_hosts += 1
        elif name != b"connection" or value != b"keep-alive":
            is_plain = False
    if head.count(b"\n") > FIELDS_MAX + 2:
        raise FramingError(431, f"the request has more than {FIELDS_MAX} header fields")
    if is_plain and num_hosts == 1:
        length = max(length, 0)
        return RequestHead(method, target, length, True, False, False, head, head[:-2], True)
    return _parse_exceptional(head, method, target, version, noted)


def _parse_exceptional(
    head: bytes, method: bytes, target: bytes, version: bytes, noted: Noted
) -> RequestHead:
    """Understand a request that holds something for this connection only, or something wrong."""
    if version not in (b"1.1", b"1.0"):
        raise FramingError(505, "only HTTP/1.1 and HTTP/1.0 are spoken here")
    is_old = version == b"1.0"
    values = _grouped(noted)
    length = _request_length(values, is_old)
    hops = _hop_by_hop(values)
    if any(protocol != b"h2c" for protocol in _tokens(values.get(b"upgrade", []))):
        # An offer of h2c may be left unanswered; the others would not go on as HTTP/1.1.
        raise FramingError(501, "the router does not upgrade connections (WebSocket and others)")
    dropped = hops
    is_waiting = False
    if b"expect" in values:
        if values[b"expect"] != [b"100-continue"]:
            raise FramingError(417, "of Expect only 100-continue is understood")
        is_waiting, dropped = not is_old, dropped | {b"expect"}
    if length == CHUNKED:
        dropped |= {b"transfer-encoding"}
    forwarded = without_fields(head[:-2], dropped) if dropped else head[:-2]
    hosts = values.get(b"host", [])
    forwarded, target = _with_origin(forwarded, hosts, method, target, is_old)
    is_persistent = not is_old and b"close" not in hops
    return RequestHead(method, target, length, is_persistent, is_old, is_waiting, head, forwarded)


def _grouped(noted: Noted) -> dict[bytes, list[bytes]]:
    """All values of each field, without the space around them."""
    values: dict[bytes, list[bytes]] = {}
    for name, value in noted:
        values.setdefault(name, []).append(value.strip(b" \t"))
    return values


def _tokens(values: list[bytes]) -> list[bytes]:
    """The members of a comma-separated field."""
    return [part for value in values for part in map(bytes.strip, value.split(b",")) if part]


def _refused_request(head: bytes) -> FramingError:
    """Say what is wrong with a head that did not match."""
    line, _, fields = head.partition(b"\r\n")
    if re.fullmatch(_TOKEN + rb" [\x21-\x7e]++ HTTP/[0-9]\.[0-9]", line) is None:
        return FramingError(400, "the request line is not HTTP")
    if re.search(rb"(?:^|\n)[ \t]", fields):
        return FramingError(400, "a header field is folded over several lines: write it on one")
    return FramingError(400, "a header field is malformed or holds a control character")


def _request_length(values: dict[bytes, list[bytes]], is_old: bool) -> int:
    """The body's length; of all that is refused here, each has smuggled requests somewhere."""
    codings = values.get(b"transfer-encoding")
    if codings is None:
        return _parse_length(values[b"content-length"]) if b"content-length" in values else 0
    if b"content-length" in values:
        raise FramingError(400, "Content-Length and Transfer-Encoding can't both be given")
    if is_old:
        raise FramingError(400, "HTTP/1.0 has no Transfer-Encoding")
    if codings != [b"chunked"]:
        raise FramingError(501, "of Transfer-Encoding only chunked is understood")
    return CHUNKED


def _parse_length(values: list[bytes]) -> int:
    if len(values) > 1:
        raise FramingError(400, "Content-Length is given more than once")
    if not values[0].isdigit() or len(values[0]) >= DIGITS_MAX:
        raise FramingError(400, "Content-Length is not one number")
    return int(values[0])


def _hop_by_hop(values: dict[bytes, list[bytes]]) -> frozenset[bytes]:
    """Names of the lines to leave out: those that concern one connection, and those it names."""
    named = _tokens(values.get(b"connection", []))
    return (frozenset(values) - _NOT_HOP_BY_HOP).union(named) - _KEPT_ANYWAY


def _with_origin(
    forwarded: bytes, hosts: list[bytes], method: bytes, target: bytes, is_old: bool
) -> tuple[bytes, bytes]:
    """Bring target, Host and version into the form that every engine understands."""
    if len(hosts) > 1 or (not hosts and not is_old):
        raise FramingError(400, "a request needs exactly one Host")
    is_origin = target[0] == _SLASH or (target == b"*" and method == b"OPTIONS")
    if is_origin and hosts and not is_old:
        return forwarded, target
    host = hosts[0] if hosts else b"localhost"
    if not is_origin:
        match = _ABSOLUTE.fullmatch(target)
        if match is None:
            raise FramingError(400, "the target must be a path such as /v1/chat/completions")
        host, path = match.groups()
        target = path or b"/"
        if target[:1] == b"?":
            target = b"/" + target
    _, _, fields = without_fields(forwarded, frozenset({b"host"})).partition(b"\r\n")
    return method + b" " + target + b" HTTP/1.1\r\nHost: " + host + b"\r\n" + fields, target


def split_response(data: bytes, *, is_for_head: bool) -> tuple[ResponseHead, int] | None:
    """The head that data begins with, and where it ends; None while it is not whole.

    Raises:
        FramingError: An engine said something that is not HTTP, or that can't be relayed.
    """
    plain = None if is_for_head or plain_response is None else plain_response(data)
    if plain is not None:
        status, length, is_event_stream, end = plain
        return ResponseHead(status, length, True, is_event_stream, data[: end - 2]), end
    end = data.find(b"\r\n\r\n") + 4
    if end > 3:
        return parse_response(data[:end], is_for_head=is_for_head), end
    if len(data) > HEAD_BYTES_MAX:
        raise FramingError(502, "the engine's response head is too long")
    return None


def parse_response(head: bytes, *, is_for_head: bool) -> ResponseHead:
    """Understand a response head.

    Args:
        head: Up to and with the empty line.
        is_for_head: Whether it answers a HEAD request, so that no body follows.

    Raises:
        FramingError: An engine said something that is not HTTP, or that can't be relayed.
    """
    match = _RESPONSE.fullmatch(head)
    if match is None or head.count(b"\n") > FIELDS_MAX + 2:
        raise FramingError(502, "the engine's response is not HTTP")
    minor, digits = match.groups()
    status, length = int(digits), UNTIL_CLOSE
    is_plain, is_event_stream = minor == b"1" and status >= 200, False
    noted = _NOTED_OF_RESPONSE.findall(head.lower())
    for name, value in noted:
        if name == b"content-type":
            is_event_stream = value.startswith(b"text/event-stream")
        elif name == b"content-length":
            is_number = value.isdigit() and len(value) < DIGITS_MAX
            is_plain = is_plain and length == UNTIL_CLOSE and is_number
            length = int(value) if is_number else 0
        elif name == b"transfer-encoding" and value == b"chunked":
            is_plain = is_plain and length == UNTIL_CLOSE
            length = CHUNKED
        else:
            is_plain = False
    if not is_plain or length == UNTIL_CLOSE or status in _WITHOUT_BODY or is_for_head:
        return _parse_exceptional_response(head, status, noted, is_for_head, is_event_stream)
    return ResponseHead(status, length, True, is_event_stream, head[:-2])


def _parse_exceptional_response(
    head: bytes, status: int, noted: Noted, is_for_head: bool, is_event_stream: bool
) -> ResponseHead:
    """Understand a response that ends in another way than most, or holds something wrong."""
    if status == 101:
        raise FramingError(502, "the engine changed the protocol unasked")
    values = _grouped(noted)
    values.pop(b"content-type", None)
    try:
        length = UNTIL_CLOSE
        if b"transfer-encoding" in values or b"content-length" in values:
            length = _request_length(values, False)
    except FramingError as error:
        raise FramingError(502, "the engine's response has no certain length") from error
    hops = _hop_by_hop(values)
    is_old = head[:8] == b"HTTP/1.0"
    has_body = not (is_for_head or status < 200 or status in _WITHOUT_BODY)
    dropped = hops if length == CHUNKED and has_body else hops | {b"transfer-encoding"}
    forwarded = without_fields(b"HTTP/1.1" + head[8:-2], dropped)
    if not has_body:
        length = 0
    is_persistent = not is_old and length != UNTIL_CLOSE and b"close" not in hops
    return ResponseHead(status, length, is_persistent, is_event_stream, forwarded)


class ChunkScanner:
    """Takes a chunked body apart, as its bytes come."""

    __slots__ = ("_at_end_of_chunk", "_line", "_missing", "_trailer_bytes", "end", "is_done")

    def __init__(self) -> None:
        self.is_done = False
        """Whether the last chunk and the trailers are over."""
        self.end = 0
        """Once done: where in the data last fed the next message begins."""
        self._missing = 0
        """Bytes of the current chunk that have not come."""
        self._at_end_of_chunk = False
        """Whether the next two bytes must be the line end behind a chunk's data."""
        self._line = b""
        """Of a line: what has come."""
        self._trailer_bytes = -1
        """Of the trailers so far; -1 before the last chunk."""

    @property
    def is_between(self) -> bool:
        """Whether no chunk is open, so that another could be put in here."""
        is_open = self._missing or self._at_end_of_chunk or self._line
        return not (is_open or self.is_done or self._trailer_bytes >= 0)

    def feed(self, data: bytes) -> list[bytes]:
        """Take more bytes; returns what of them is payload, in order.

        Raises:
            FramingError: It is not a chunked body.
        """
        payload: list[bytes] = []
        at, size = 0, len(data)
        while at < size and not self.is_done:
            if self._missing:
                piece = data[at : at + self._missing]
                payload.append(piece)
                at += len(piece)
                self._missing -= len(piece)
                self._at_end_of_chunk = not self._missing
                continue
            line, at = self._take_line(data, at)
            if line is not None:
                self._read_line(line)
        self.end = at
        return payload

    def _take_line(self, data: bytes, at: int) -> tuple[bytes | None, int]:
        found = data.find(b"\n", at)
        end = len(data) if found < 0 else found + 1
        if len(self._line) + end - at > CHUNK_LINE_BYTES_MAX:
            raise FramingError(400, "a line between chunks is too long")
        self._line += data[at:end]
        if found < 0:
            return None, end
        line, self._line = self._line, b""
        return line, end

    def _read_line(self, line: bytes) -> None:
        if self._at_end_of_chunk:
            if line != b"\r\n":
                raise FramingError(400, "a chunk is longer than its size says")
            self._at_end_of_chunk = False
        elif self._trailer_bytes >= 0:
            self._trailer_bytes += len(line)
            if line == b"\r\n":
                self.is_done = True
            elif _TRAILER_LINE.fullmatch(line) is None or self._trailer_bytes > TRAILER_BYTES_MAX:
                raise FramingError(400, "the trailer of a chunked body is malformed or too long")
        else:
            match = _CHUNK_LINE.fullmatch(line)
            if match is None:
                raise FramingError(400, "the size of a chunk is malformed")
            self._missing = int(match[1], 16)
            if not self._missing:
                self._trailer_bytes = 0


def are_whole_chunks(data: bytes, is_event_stream: bool) -> bool:
    """Whether data that comes between two chunks may be passed on as it is.

    It is plain chunks from beginning to end, the last one not among them, and of a stream of events
    whole lines. This is how a stream comes, so it is worth a way of its own: nothing is fed then.
    """
    if whole_chunks is not None:
        return whole_chunks(data, is_event_stream)
    match = _PLAIN_CHUNK_LINE.match(data)
    if match is None:
        return False
    begin, size = match.end(), int(match[1], 16)
    if size == 0 or begin + size + 2 != len(data) or data[-2:] != b"\r\n":
        return False
    return not is_event_stream or data[-3] in b"\r\n"


def chunk(payload: bytes) -> bytes:
    """One chunk of a body; empty for an empty payload, which would end it."""
    return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""


LAST_CHUNK: Final = b"0\r\n\r\n"
