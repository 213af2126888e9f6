"""An engine's response, turned into what one client gets; bytes in, bytes out, no I/O.

What is written to the client always ends between two chunks, and of a stream of events between two
lines: whenever the engine breaks off, an error can still be put in where a client reads it.
"""

from typing import Final

from kvkeep.router.relay.errors import error_event
from kvkeep.router.relay.framing import (
    CHUNKED,
    LAST_CHUNK,
    UNTIL_CLOSE,
    ChunkScanner,
    ResponseHead,
    are_whole_chunks,
    chunk,
    split_response,
    without_fields,
)

HELD_BYTES_MAX: Final = 64 << 10
"""Of an unfinished line of an event stream; a longer one goes on in parts."""
_LINE_ENDS: Final = b"\r\n"
_CONTINUE: Final = 100
_CODING: Final = frozenset({b"transfer-encoding"})


class Answer:
    """The response to one request, as it comes."""

    __slots__ = (
        "_data",
        "_held",
        "_is_for_head",
        "_is_for_old",
        "_left",
        "_scanner",
        "head",
        "is_exact",
        "is_over",
    )

    def __init__(self, *, is_for_head: bool, is_for_old: bool) -> None:
        """Have seen nothing.

        Args:
            is_for_head: The request was HEAD: no body follows.
            is_for_old: The client speaks HTTP/1.0: it can't be sent chunks.
        """
        self._is_for_head, self._is_for_old = is_for_head, is_for_old
        self._data = b""
        """Of a head that is not whole."""
        self._left = 0
        """Bytes of a body of known length that have not come."""
        self._scanner: ChunkScanner | None = None
        self._held = b""
        """The unfinished line of an event stream."""
        self.head: ResponseHead | None = None
        self.is_over = False
        """Whether all has come."""
        self.is_exact = True
        """Whether nothing came that does not belong to it."""

    @property
    def is_ended_by_close(self) -> bool:
        """Whether the end of the connection is the end of the body."""
        return self.head is not None and self.head.length == UNTIL_CLOSE

    @property
    def can_be_mended(self) -> bool:
        """Whether an error can be put into what the client has so far."""
        head = self.head
        return head is not None and head.is_event_stream and head.length < 0

    @property
    def can_be_pumped(self) -> bool:
        """Whether whole chunks, of whole lines, may be passed on behind this object's back."""
        return (
            self._scanner is not None
            and self._scanner.is_between
            and not (self._held or self._is_for_old)
        )

    def find_head(self, data: bytes) -> tuple[bytes, bytes] | None:
        """Take bytes until the head is whole.

        Returns:
            None while it is not; else interim responses as the client gets them, and what came
            of the body, for ``take``.

        Raises:
            FramingError: It can't be relayed.
        """
        data = self._data + data if self._data else data
        interim = b""
        while True:
            found = split_response(data, is_for_head=self._is_for_head)
            if found is None:
                self._data = data
                return (interim, b"") if interim else None
            head, end = found
            if head.status >= 200:
                break
            # Whoever asked to be told to go on was told by the relay.
            if head.status != _CONTINUE and not self._is_for_old:
                interim += head.forwarded + b"\r\n"
            data = data[end:]
        self.head, self._data = head, b""
        self._left = head.length
        if head.length == CHUNKED:
            self._scanner = ChunkScanner()
        return interim, data[end:]

    def head_bytes(self, fields: bytes) -> bytes:
        """The head as the client gets it, with more fields of the relay."""
        head = self.head
        assert head is not None
        if head.length == UNTIL_CLOSE and not self._is_for_old:
            fields += b"Transfer-Encoding: chunked\r\n"
        elif head.length == CHUNKED and self._is_for_old:
            return without_fields(head.forwarded, _CODING) + fields + b"\r\n"
        return head.forwarded + fields + b"\r\n"

    def take(self, data: bytes) -> bytes:
        """Take bytes of the body; returns what the client gets.

        Raises:
            FramingError: It can't be relayed further.
        """
        scanner = self._scanner
        if scanner is None:
            return self._take_plain(data)
        assert self.head is not None
        is_event_stream = self.head.is_event_stream
        if self.can_be_pumped and are_whole_chunks(data, is_event_stream):
            return data
        payload = b"".join(scanner.feed(data))
        self.is_over = scanner.is_done
        self.is_exact = self.is_exact and (not scanner.is_done or scanner.end == len(data))
        if is_event_stream:
            payload = self._whole_lines(payload)
        return self._framed(payload)

    def end(self) -> bytes:
        """The connection ended, and with it the body; returns what the client still gets."""
        assert self.is_ended_by_close
        self.is_over, self.is_exact = True, False
        payload, self._held = self._held, b""
        return self._framed(payload)

    def mend(self, status: int, message: str) -> bytes:
        """End an event stream that broke off with an error; of an unfinished line nothing is kept.

        A line that was sent may be the first of an event: an empty one ends it.
        """
        assert self.can_be_mended
        self._held, self.is_over = b"", True
        return self._framed(b"\n" + error_event(status, message))

    def _take_plain(self, data: bytes) -> bytes:
        assert self.head is not None
        if self.head.length == UNTIL_CLOSE:
            return self._framed(self._whole_lines(data) if self.head.is_event_stream else data)
        if len(data) > self._left:
            data, self.is_exact = data[: self._left], False
        self._left -= len(data)
        self.is_over = self._left == 0
        return data

    def _whole_lines(self, payload: bytes) -> bytes:
        if self._held:
            payload, self._held = self._held + payload, b""
        if self.is_over or not payload or payload[-1] in _LINE_ENDS:
            return payload
        end = max(payload.rfind(b"\n"), payload.rfind(b"\r")) + 1
        if len(payload) - end > HELD_BYTES_MAX:
            return payload
        self._held = payload[end:]
        return payload[:end]

    def _framed(self, payload: bytes) -> bytes:
        if self._is_for_old:
            return payload
        return chunk(payload) + LAST_CHUNK if self.is_over else chunk(payload)
