"""Fewer bytes at rest and on the way, and the same bytes back.

    | magic | version | codec | element bytes | value length | the value, or one compressed frame |

A value that does not shrink by ``GAIN_MIN`` is stored as it is, without a copy. Compression has no
digest of its own: prove what comes back with ``VerifiedTier`` around it, and encrypt inside of it.
"""

import struct
from collections.abc import Sequence

from kvkeep.model.errors import CorruptDataError
from kvkeep.model.ids import BlockKey
from kvkeep.tiers.base import Parts, Tier, length_of
from kvkeep.tiers.memory import scatter
from kvkeep.tiers.wrappers.codecs import ZstdCodec
from kvkeep.tiers.wrappers.wrapper import Checking, in_steps, leading

_FIELDS = struct.Struct("<4sHBBQ")
HEADER_BYTES = _FIELDS.size
MAGIC = b"kvkc"
VERSION = 1
PLAIN, ZSTD = 0, 1
GAIN_MIN = 0.05
"""Less is not worth the time to undo it."""

TRUNCATED = "truncated"
WRONG_FORMAT = "wrong_format"
WRONG_LENGTH = "wrong_length"
BROKEN_FRAME = "broken_frame"
REASONS = (TRUNCATED, WRONG_FORMAT, WRONG_LENGTH, BROKEN_FRAME)


class CompressedTier(Checking):
    """A tier whose inner tier keeps compressed values where that helps.

    What can't be undone, or would not fit the caller's room, is a miss; the former is counted by
    reason and deleted. Whatever a frame claims, no more than the room is ever decompressed.
    """

    overhead_bytes = HEADER_BYTES
    """What a value that does not shrink is longer by in the inner tier."""

    def __init__(self, inner: Tier, codec: ZstdCodec) -> None:
        super().__init__(inner, (*REASONS, "values_plain", "values_shrunk"))
        self._codec = codec

    def write(self, keys: Sequence[BlockKey], values: Sequence[Parts]) -> list[bool]:
        """Compress copies and write them, or the values themselves where they do not shrink."""
        kept: list[bool] = []
        for step in in_steps([length_of(value) for value in values]):
            packed = [self._pack(value) for value in values[step]]
            kept += self._inner.write(keys[step], packed)
        return kept

    def _pack(self, value: Parts) -> Parts:
        length, element_bytes = length_of(value), self._codec.element_bytes
        frame = self._codec.compress(value) if length else b""
        if not length or len(frame) > length * (1 - GAIN_MIN):
            self._count("values_plain")
            return [memoryview(_FIELDS.pack(MAGIC, VERSION, PLAIN, 1, length)), *value]
        self._count("values_shrunk")
        header = _FIELDS.pack(MAGIC, VERSION, ZSTD, element_bytes, length)
        return [memoryview(header), memoryview(frame)]

    def read(self, keys: Sequence[BlockKey], into: Sequence[Parts]) -> list[int | None]:
        """Read, and decompress what is compressed."""
        headers = [bytearray(HEADER_BYTES) for _ in keys]
        # A plain value lands where it belongs; a frame is shorter, and lies there until undone.
        rooms = [[memoryview(head), *room] for head, room in zip(headers, into, strict=True)]
        lengths = self._inner.read(keys, rooms)
        found: list[int | None] = []
        wrong: list[tuple[BlockKey, str]] = []
        for key, header, room, length in zip(keys, headers, into, lengths, strict=True):
            unpacked = None if length is None else self._unpack(header, room, length)
            if isinstance(unpacked, str):
                wrong.append((key, unpacked))
            found.append(unpacked if isinstance(unpacked, int) else None)
        self._reject(wrong)
        return found

    def _unpack(self, header: bytearray, room: Parts, length: int) -> int | str | None:
        """Bytes of the value that is in its room now; None without room; or what is wrong."""
        if length < HEADER_BYTES:
            return TRUNCATED
        magic, version, codec, element_bytes, value_bytes = _FIELDS.unpack(header)
        if (magic, version) != (MAGIC, VERSION) or codec not in (PLAIN, ZSTD):
            return WRONG_FORMAT
        stored_bytes = length - HEADER_BYTES
        if codec == PLAIN:
            return int(value_bytes) if value_bytes == stored_bytes else WRONG_LENGTH
        if stored_bytes >= value_bytes:
            return WRONG_LENGTH
        if value_bytes > length_of(room):
            return None
        frame = b"".join(leading(room, stored_bytes))
        try:
            value = self._codec.decompress(frame, value_bytes, element_bytes)
        except CorruptDataError:
            return BROKEN_FRAME
        scatter(value, room)
        return int(value_bytes)
