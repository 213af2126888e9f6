"""Frames on a byte stream: a length, then that many bytes of one message."""

import struct

from kvkeep.model.errors import InputError

_LENGTH = struct.Struct("<I")
HEADER_BYTES = _LENGTH.size
FRAME_BYTES_MAX = 2 << 20
"""The largest message holds 2**15 hashes of 32 bytes; twice that is a defect or an attack."""


def frame(payload: bytes) -> bytes:
    """Put a length before a message."""
    if len(payload) > FRAME_BYTES_MAX:
        raise InputError(f"message too large. bytes={len(payload)} limit={FRAME_BYTES_MAX}")
    return _LENGTH.pack(len(payload)) + payload


class FrameReader:
    """Cuts a stream of bytes, fed in any pieces, into messages.

    Holds at most one incomplete frame, so at most ``FRAME_BYTES_MAX`` and what one read returned.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take in bytes; return the messages they complete.

        Raises:
            InputError: A length above the limit. The stream can't be followed any further.
        """
        self._buffer += data
        messages = []
        start = 0
        while len(self._buffer) - start >= HEADER_BYTES:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > FRAME_BYTES_MAX:
                raise InputError(f"frame too large. bytes={length} limit={FRAME_BYTES_MAX}")
            end = start + HEADER_BYTES + length
            if len(self._buffer) < end:
                break
            messages.append(bytes(self._buffer[start + HEADER_BYTES : end]))
            start = end
        del self._buffer[:start]
        return messages
