"""Proof that what comes back is what went in, for exactly that key.

Each value is stored behind an envelope that names it:

    | magic | version | group | value length | namespace | block hash | XXH3-128 of value | check |

All integers are little-endian; ``check`` is the XXH3-64 of everything before it, and zeros fill the
header up to ``HEADER_BYTES``. XXH3 finds accidents, not forgery: for that there is encryption.
"""

import struct
from collections.abc import Sequence

import xxhash

from kvkeep.model.ids import BlockKey
from kvkeep.tiers.base import Parts, Tier, length_of
from kvkeep.tiers.wrappers.wrapper import Checking, leading

_FIELDS = struct.Struct("<4sHHQ32s32s16s24xQ")
HEADER_BYTES = _FIELDS.size
"""A power of two, so that the payload stays aligned where the medium aligns the value."""
_CHECKED_BYTES = HEADER_BYTES - 8
MAGIC = b"kvkv"
VERSION = 1

TRUNCATED = "truncated"
TORN_HEADER = "torn_header"
WRONG_FORMAT = "wrong_format"
WRONG_KEY = "wrong_key"
WRONG_LENGTH = "wrong_length"
WRONG_DIGEST = "wrong_digest"
REASONS = (TRUNCATED, TORN_HEADER, WRONG_FORMAT, WRONG_KEY, WRONG_LENGTH, WRONG_DIGEST)


class VerifiedTier(Checking):
    """A tier whose every hit is proven: key, length and all bytes.

    Whatever is not what was written under that key is a miss, counted by reason, and deleted.
    The payload is not copied: the envelope is one more part before it.
    """

    overhead_bytes = HEADER_BYTES
    """What each value is longer by in the inner tier."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner, REASONS)

    def write(self, keys: Sequence[BlockKey], values: Sequence[Parts]) -> list[bool]:
        """Put each value into an envelope and write both."""
        sealed = [
            [memoryview(_header(key, value)), *value]
            for key, value in zip(keys, values, strict=True)
        ]
        return self._inner.write(keys, sealed)

    def read(self, keys: Sequence[BlockKey], into: Sequence[Parts]) -> list[int | None]:
        """Read, and check everything."""
        headers = [bytearray(HEADER_BYTES) for _ in keys]
        rooms = [[memoryview(head), *room] for head, room in zip(headers, into, strict=True)]
        lengths = self._inner.read(keys, rooms)
        found: list[int | None] = []
        wrong: list[tuple[BlockKey, str]] = []
        for key, header, room, length in zip(keys, headers, into, lengths, strict=True):
            reason = None if length is None else _find_fault(key, header, room, length)
            if reason is not None:
                wrong.append((key, reason))
            is_right = length is not None and reason is None
            found.append(length - HEADER_BYTES if length is not None and is_right else None)
        self._reject(wrong)
        return found


def _header(key: BlockKey, value: Parts) -> bytes:
    names = (key.group_idx, length_of(value), key.namespace, key.block_hash)
    unchecked = _FIELDS.pack(MAGIC, VERSION, *names, _digest(value), 0)[:_CHECKED_BYTES]
    return unchecked + struct.pack("<Q", xxhash.xxh3_64_intdigest(unchecked))


def _digest(parts: Parts) -> bytes:
    made = xxhash.xxh3_128()
    for part in parts:
        # Not by the constructor: only ``update`` lets other threads run, from 64 KiB a part on
        # (python-xxhash 4.1, src/_xxhash.c, XXHASH_GIL_MINSIZE).
        made.update(part)
    return made.digest()


def _find_fault(key: BlockKey, header: bytearray, room: Parts, length: int) -> str | None:
    """Name what is wrong with a value of ``length`` bytes, envelope and all; None if nothing is."""
    if length < HEADER_BYTES:
        return TRUNCATED
    magic, version, group_idx, value_bytes, namespace, block_hash, digest, check = _FIELDS.unpack(
        header
    )
    if check != xxhash.xxh3_64_intdigest(memoryview(header)[:_CHECKED_BYTES]):
        return TORN_HEADER
    if (magic, version) != (MAGIC, VERSION):
        return WRONG_FORMAT
    if (namespace, block_hash, group_idx) != (key.namespace, key.block_hash, key.group_idx):
        return WRONG_KEY
    if value_bytes != length - HEADER_BYTES:
        return WRONG_LENGTH
    if digest != _digest(leading(room, value_bytes)):
        return WRONG_DIGEST
    return None
