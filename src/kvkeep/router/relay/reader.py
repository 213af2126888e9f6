"""Requests out of the bytes of one client connection, one after another; no I/O.

A body is gathered whole up to ``gathered_bytes_max``: then it can be looked at by a policy, sent a
second time, and an engine is not kept waiting by a slow client. What is larger is handed on in
pieces. A chunked body that was gathered goes on with a length, so that no engine ever sees the
client's own chunks.
"""

from typing import Final

import msgspec

from kvkeep.router.relay.framing import (
    CHUNKED,
    HEAD_BYTES_MAX,
    ChunkScanner,
    FramingError,
    RequestHead,
    chunk,
    split_request,
    without_fields,
)

LENGTH: Final = frozenset({b"content-length"})


class Request(msgspec.Struct):
    """A request that can be routed."""

    head: RequestHead
    body: bytes
    """Of a request that is not whole: its beginning."""
    is_whole: bool
    wire: bytes | None = None
    """Head and body as they came, if that is what an engine gets."""

    def framed(self) -> bytes:
        """Head and body for an engine; of a request that is not whole, as much as there is."""
        out, body = self.head.forwarded, self.body
        if self.head.length == CHUNKED:
            if self.is_whole:
                out += b"Content-Length: %d\r\n" % len(body)
            else:
                out += b"Transfer-Encoding: chunked\r\n"
                body = chunk(body)
        return b"".join((out, b"\r\n", body))

    def with_body(
        self, body: bytes, *, dropped: frozenset[bytes] = LENGTH, fields: bytes = b""
    ) -> "Request":
        """The same request with another body, whole.

        Args:
            body: All of it.
            dropped: Lower-case names of header fields that do not go on, the length among them.
            fields: Header lines to add.
        """
        forwarded = without_fields(self.head.forwarded, dropped)
        forwarded += b"%bContent-Length: %d\r\n" % (fields, len(body))
        head = msgspec.structs.replace(
            self.head, length=len(body), is_waiting=False, forwarded=forwarded
        )
        return Request(head, body, is_whole=True)


class RequestReader:
    """Takes a connection's bytes apart.

    ``feed``, then ``take`` until it answers None. After a request that is not whole ``take_more``
    until its second value is true; only then ``take`` again.
    """

    __slots__ = (
        "_body_bytes_max",
        "_data",
        "_gathered_bytes_max",
        "_head",
        "_missing",
        "_num_body_bytes",
        "_parts",
        "_scanner",
        "is_continue_due",
    )

    def __init__(self, gathered_bytes_max: int, body_bytes_max: int) -> None:
        self._gathered_bytes_max, self._body_bytes_max = gathered_bytes_max, body_bytes_max
        self._data = b""
        """What came and was not looked at."""
        self._head: RequestHead | None = None
        """Of the request whose body is being gathered."""
        self._parts: list[bytes] = []
        self._num_body_bytes = 0
        self._missing = 0
        self._scanner: ChunkScanner | None = None
        self.is_continue_due = False
        """Whether the client waits for ``100 Continue``; who sends it sets this back."""

    @property
    def num_waiting_bytes(self) -> int:
        """Bytes that came and belong to no request yet."""
        return len(self._data)

    @property
    def is_inside(self) -> bool:
        """Whether a request has begun and is not whole."""
        return self._head is not None or bool(self._data)

    @property
    def has_head(self) -> bool:
        """Whether the head of the request that has begun is over."""
        return self._head is not None

    @property
    def head(self) -> RequestHead | None:
        """Of the request whose body is being gathered, or handed on in pieces."""
        return self._head

    def feed(self, data: bytes) -> None:
        """More bytes came."""
        self._data = self._data + data if self._data else data

    def take(self) -> Request | None:
        """The next request, if there is one.

        Raises:
            FramingError: The bytes can't be understood; the connection has to be closed.
        """
        if self._head is not None:
            return self._gather(self._head)
        data = self._data
        while data[:2] == b"\r\n":  # some clients end a body with a line too many (RFC 9112, 2.2)
            data = self._data = data[2:]
        found = split_request(data)
        if found is None:
            _check_beginning(data)
            return None
        head, end = found
        length = head.length
        if length > self._body_bytes_max:
            raise FramingError(413, f"the body has more than {self._body_bytes_max} bytes")
        after = end + length
        if 0 <= length <= self._gathered_bytes_max and after <= len(data):
            self._data = data[after:]
            return Request(head, data[end:after], True, data[:after] if head.is_unchanged else None)
        self._head, self._data = head, data[end:]
        self._missing, self._scanner = length, ChunkScanner() if length == CHUNKED else None
        self._num_body_bytes = 0
        self.is_continue_due = head.is_waiting and not self._data
        return self._gather(head)

    def take_more(self) -> tuple[bytes, bool]:
        """What came of the body of a request that was handed out before it was whole.

        Returns:
            Payload, and whether the body is over.

        Raises:
            FramingError: As ``take``.
        """
        assert self._head is not None
        self._split_body()
        payload, self._parts = b"".join(self._parts), []
        is_over = self._is_body_over
        if is_over:
            self._head = None
        return payload, is_over

    @property
    def _is_body_over(self) -> bool:
        return self._missing == 0 if self._scanner is None else self._scanner.is_done

    def _gather(self, head: RequestHead) -> Request | None:
        self._split_body()
        is_whole = self._is_body_over
        if not is_whole and self._num_body_bytes < self._gathered_bytes_max:
            return None
        body, self._parts = b"".join(self._parts), []
        if is_whole:
            self._head = None
        return Request(head, body, is_whole)

    def _split_body(self) -> None:
        """Move what belongs to the body from the data to the parts."""
        data, self._data = self._data, b""
        if not data:
            return
        if self._scanner is None:
            piece = data[: self._missing]
            self._missing -= len(piece)
            self._data = data[len(piece) :]
            self._keep(piece)
            return
        for piece in self._scanner.feed(data):
            self._keep(piece)
        self._data = data[self._scanner.end :]

    def _keep(self, piece: bytes) -> None:
        self._num_body_bytes += len(piece)
        if self._num_body_bytes > self._body_bytes_max:
            raise FramingError(413, f"the body has more than {self._body_bytes_max} bytes")
        self._parts.append(piece)


def _check_beginning(data: bytes) -> None:
    """Refuse early what can't become a head: nobody has to wait for an end that won't come."""
    if len(data) > HEAD_BYTES_MAX:
        raise FramingError(431, f"the request head has more than {HEAD_BYTES_MAX} bytes")
    at = data.find(b"\n")
    if at >= 0 and data[at - 1 : at] != b"\r":
        raise FramingError(400, "a line of the request ends without a carriage return")
