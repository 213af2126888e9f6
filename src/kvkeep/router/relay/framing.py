"""Where an HTTP/1.1 message begins and ends, and what is refused: bytes in, values out, no I/O.

Two programs that disagree about where a request ends let one client write into another's
connection. So everything that RFC 9112 leaves to a recipient's good will is refused here: both
lengths, several lengths, folded lines, bare CR or LF, control characters, unknown transfer codings.
What is left reads alike everywhere; the tests compare with llhttp, the parser in the engines.

A head is one regular expression over its bytes, and is passed on as the bytes that came, less the
lines that concern one connection only (RFC 9110, 7.6.1).
"""

import re
from dataclasses import dataclass
from typing import Final

HEAD_BYTES_MAX: Final = 64 << 10
"""Of a request or response head; engines refuse more as well."""
FIELDS_MAX: Final = 128
CHUNK_LINE_BYTES_MAX: Final = 1024
"""Of a chunk's size with its extensions, and of each trailer line."""
TRAILER_BYTES_MAX: Final = 8 << 10
UNTIL_CLOSE: Final = -1
"""As a length: the body ends with the connection."""
CHUNKED: Final = -2
"""As a length: the body is in chunks."""

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_FIELDS = rb"((?:" + _TOKEN + rb":[\t\x20-\x7e\x80-\xff]*+\r\n)*+)\r\n"
_REQUEST = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e]++) HTTP/([0-9])\.([0-9])\r\n" + _FIELDS)
_RESPONSE = re.compile(
    rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*+))?\r\n" + _FIELDS
)
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/?#@\s]++)([/?].*+)?")
_DIGITS = re.compile(rb"[0-9]{1,18}")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*+)?\r\n")
_PLAIN_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})\r\n")
_TRAILER_LINE = re.compile(_TOKEN + rb":[\t\x20-\x7e\x80-\xff]*+\r\n")

_HOP_BY_HOP = (
    *(b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer"),
    *(b"upgrade", b"http2-settings"),
)
"""Fields that concern one connection; Transfer-Encoding is dealt with where the body is."""
_KEPT_ANYWAY = frozenset({b"content-length", b"transfer-encoding", b"host", b"content-type"})
"""What a Connection field can't take away: the message would mean something else without."""


class FramingError(Exception):
    """Bytes that are not HTTP as the relay accepts it; the connection can't be trusted further."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        """What a client is told; of a response it is 502."""
        self.message = message


@dataclass(slots=True)
class RequestHead:
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

    def field(self, name: bytes) -> bytes | None:
        """The value of the first field of this lower-case name; None if there is none."""
        return find_field(self.raw, name)


@dataclass(slots=True)
class ResponseHead:
    """The head of a response."""

    status: int
    length: int
    """Of the body in bytes, 0 where there can't be one; ``CHUNKED`` or ``UNTIL_CLOSE``."""
    is_persistent: bool
    """Whether the connection can serve another request."""
    is_event_stream: bool
    forwarded: bytes
    """What the client gets, without the empty line and without Transfer-Encoding."""


def find_field(head: bytes, name: bytes) -> bytes | None:
    """The value of the first field of this lower-case name; None if there is none."""
    at = head.lower().find(b"\r\n" + name + b":")
    if at < 0:
        return None
    begin = at + len(name) + 3
    return head[begin : head.index(b"\r\n", begin)].strip(b" \t")


def _values(lower: bytes, name: bytes) -> list[bytes]:
    """All values of a field of a head in lower case."""
    mark = b"\r\n" + name + b":"
    values = []
    at = lower.find(mark)
    while at >= 0:
        begin = at + len(mark)
        end = lower.index(b"\r\n", begin)
        values.append(lower[begin:end].strip(b" \t"))
        at = lower.find(mark, end)
    return values


def _tokens(values: list[bytes]) -> list[bytes]:
    """The members of a comma-separated field."""
    return [part for value in values for part in map(bytes.strip, value.split(b",")) if part]


def without_fields(head: bytes, names: frozenset[bytes]) -> bytes:
    """A head less the lines of these lower-case names; every other byte stays where it was."""
    first, *lines = head.split(b"\r\n")
    kept = [line for line in lines if line.partition(b":")[0].lower() not in names]
    return b"\r\n".join([first, *kept])


def parse_request(head: bytes) -> RequestHead:
    """Understand a request head.

    Args:
        head: Up to and with the empty line, as ``find_head_end`` found it.

    Raises:
        FramingError: It is refused; the status says why.
    """
    match = _REQUEST.fullmatch(head)
    if match is None:
        raise _refused_request(head)
    method, target, major, minor = match.group(1, 2, 3, 4)
    if major != b"1" or minor not in b"01":
        raise FramingError(505, "only HTTP/1.1 and HTTP/1.0 are spoken here")
    if head.count(b"\r\n") > FIELDS_MAX + 2:
        raise FramingError(431, f"the request has more than {FIELDS_MAX} header fields")
    is_old = minor == b"0"
    lower = head.lower()
    length = _request_length(lower, is_old)
    forwarded, is_persistent = head[:-2], not is_old
    named = _hop_by_hop(lower)
    if named:
        is_persistent = is_persistent and b"close" not in named
        _refuse_upgrade(lower)
        forwarded = without_fields(forwarded, named)
    is_waiting = False
    if b"\r\nexpect:" in lower:
        if _values(lower, b"expect") != [b"100-continue"]:
            raise FramingError(417, "of Expect only 100-continue is understood")
        is_waiting = not is_old
        forwarded = without_fields(forwarded, frozenset({b"expect"}))
    if length == CHUNKED:
        forwarded = without_fields(forwarded, frozenset({b"transfer-encoding"}))
    if is_old or target[:1] != b"/" or lower.count(b"\r\nhost:") != 1:
        forwarded, target = _with_origin(forwarded, lower, method, target, is_old)
    return RequestHead(method, target, length, is_persistent, is_old, is_waiting, head, forwarded)


def _refused_request(head: bytes) -> FramingError:
    """Say what is wrong with a head that did not match."""
    line, _, fields = head.partition(b"\r\n")
    if re.fullmatch(_TOKEN + rb" [\x21-\x7e]++ HTTP/[0-9]\.[0-9]", line) is None:
        return FramingError(400, "the request line is not HTTP")
    if re.search(rb"(?:^|\n)[ \t]", fields):
        return FramingError(400, "a header field is folded over several lines: write it on one")
    return FramingError(400, "a header field is malformed or holds a control character")


def _request_length(lower: bytes, is_old: bool) -> int:
    """The body's length; of all that is refused here, each has smuggled requests somewhere."""
    at = lower.find(b"\r\ncontent-length:")
    if b"\r\ntransfer-encoding:" in lower:
        if at >= 0:
            raise FramingError(400, "Content-Length and Transfer-Encoding can't both be given")
        if is_old:
            raise FramingError(400, "HTTP/1.0 has no Transfer-Encoding")
        codings = _values(lower, b"transfer-encoding")
        if codings != [b"chunked"]:
            raise FramingError(501, "of Transfer-Encoding only chunked is understood")
        return CHUNKED
    if at < 0:
        return 0
    return _parse_length(lower, at)


def _parse_length(lower: bytes, at: int) -> int:
    end = lower.index(b"\r\n", at + 2)
    value = lower[at + 17 : end].strip(b" \t")
    if _DIGITS.fullmatch(value) is None:
        raise FramingError(400, "Content-Length is not one number")
    if lower.find(b"\r\ncontent-length:", end) >= 0:
        raise FramingError(400, "Content-Length is given more than once")
    return int(value)


def _hop_by_hop(lower: bytes) -> frozenset[bytes]:
    """Names of the lines to leave out: those that concern one connection, and those it names."""
    found = [name for name in _HOP_BY_HOP if b"\r\n" + name + b":" in lower]
    if not found:
        return frozenset()
    named = _tokens(_values(lower, b"connection")) if b"connection" in found else []
    return frozenset(found).union(named) - _KEPT_ANYWAY


def _refuse_upgrade(lower: bytes) -> None:
    """Refuse what would stop being HTTP/1.1; an offer of h2c may be left unanswered."""
    protocols = _tokens(_values(lower, b"upgrade"))
    if any(protocol != b"h2c" for protocol in protocols):
        raise FramingError(501, "the router does not upgrade connections (WebSocket and others)")


def _with_origin(
    forwarded: bytes, lower: bytes, method: bytes, target: bytes, is_old: bool
) -> tuple[bytes, bytes]:
    """Bring target, Host and version into the form that every engine understands."""
    num_hosts = lower.count(b"\r\nhost:")
    if num_hosts > 1 or (num_hosts == 0 and not is_old):
        raise FramingError(400, "a request needs exactly one Host")
    host = _values(lower, b"host")[0] if num_hosts else b""
    if target[:1] != b"/" and not (target == b"*" and method == b"OPTIONS"):
        match = _ABSOLUTE.fullmatch(target)
        if match is None or method == b"CONNECT":
            raise FramingError(400, "the target must be a path such as /v1/chat/completions")
        host, path = match.group(1, 2)
        target = path or b"/"
        if target[:1] == b"?":
            target = b"/" + target
        forwarded = without_fields(forwarded, frozenset({b"host"}))
        num_hosts = 0
    _, _, fields = forwarded.partition(b"\r\n")
    line = method + b" " + target + b" HTTP/1.1\r\n"
    if num_hosts == 0:
        line += b"Host: " + (host or b"localhost") + b"\r\n"
    return line + fields, target


def parse_response(head: bytes, *, is_for_head: bool) -> ResponseHead:
    """Understand a response head.

    Args:
        head: Up to and with the empty line.
        is_for_head: Whether it answers a HEAD request, so that no body follows.

    Raises:
        FramingError: An engine said something that is not HTTP, or that can't be relayed.
    """
    match = _RESPONSE.fullmatch(head)
    if match is None or head.count(b"\r\n") > FIELDS_MAX + 2:
        raise FramingError(502, "the engine's response is not HTTP")
    is_old, status = match[1] == b"0", int(match[2])
    if status == 101:
        raise FramingError(502, "the engine changed the protocol unasked")
    lower = head.lower()
    is_chunked = b"\r\ntransfer-encoding:" in lower
    length = _response_length(lower, is_chunked)
    forwarded = head[:-2] if not is_old else b"HTTP/1.1" + head[8:-2]
    is_persistent = not is_old and length != UNTIL_CLOSE
    named = _hop_by_hop(lower)
    if named:
        is_persistent = is_persistent and b"close" not in named
    if named or is_chunked:
        forwarded = without_fields(forwarded, named | {b"transfer-encoding"})
    if is_for_head or status < 200 or status in (204, 304):
        is_persistent = is_persistent or (not is_old and b"close" not in named)
        length = 0
    at = lower.find(b"\r\ncontent-type:")
    is_event_stream = at >= 0 and b"text/event-stream" in lower[at : lower.index(b"\r\n", at + 2)]
    return ResponseHead(status, length, is_persistent, is_event_stream, forwarded)


def _response_length(lower: bytes, is_chunked: bool) -> int:
    at = lower.find(b"\r\ncontent-length:")
    if is_chunked:
        if at >= 0 or _values(lower, b"transfer-encoding") != [b"chunked"]:
            raise FramingError(502, "the engine's response has no certain length")
        return CHUNKED
    if at < 0:
        return UNTIL_CLOSE
    try:
        return _parse_length(lower, at)
    except FramingError as error:
        raise FramingError(502, "the engine's response has no certain length") from error


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
        return not (self._missing or self._at_end_of_chunk or self._line or self.is_done)

    def find_single(self, data: bytes) -> int:
        """Where the payload begins, if the data is one whole plain chunk; else -1.

        This is how a stream of events comes, so it is worth a way of its own: such data can be
        passed on as it is, and nothing is fed.
        """
        match = _PLAIN_CHUNK_LINE.match(data)
        if match is None or not self.is_between or self._trailer_bytes >= 0:
            return -1
        begin, size = match.end(), int(match[1], 16)
        if size == 0 or begin + size + 2 != len(data) or data[-2:] != b"\r\n":
            return -1
        return begin

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


def find_head_end(data: bytes | bytearray, start: int = 0) -> int:
    """Where the body begins; -1 if the head is not whole.

    A head that ends in bare line feeds never ends here, so it is refused sooner: see
    ``has_bare_line_feed``.
    """
    at = data.find(b"\r\n\r\n", start)
    return -1 if at < 0 else at + 4


def chunk(payload: bytes) -> bytes:
    """One chunk of a body; empty for an empty payload, which would end it."""
    return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""


LAST_CHUNK: Final = b"0\r\n\r\n"
