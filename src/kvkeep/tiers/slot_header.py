"""The header in front of every slot of the pool, and the digests behind it.

    offset  bytes  field
    0       8      XXH3-64 of all that follows: bytes 8..127, and of a ready slot the digests too
    8       4      magic "KVKS"
    12      2      version of this format
    14      1      state: 0 free, 1 writing, 2 ready
    15      1      zero
    16      8      generation of the daemon that wrote it
    24      8      write lease
    32      8      payload bytes
    40      32     namespace
    72      32     block hash
    104     2      group
    106     2      zero
    108     4      pid of the writer
    112     8      sequence: grows with every header written
    120     8      zero
    128     16 n   XXH3-128 of each head page, canonical byte order

Only the daemon writes the first 128 bytes; only the holder of the write lease writes the digests.
The check of a ready slot binds them to the key: bytes and digests that are right, but another
block's, are found too.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import xxhash

from kvkeep.model.ids import BlockHash, BlockKey, Namespace

MAGIC = b"KVKS"
FORMAT_VERSION = 1
HEADER_BYTES = 128
DIGEST_BYTES = 16
CHECK_BYTES = 8
SEQUENCE_MAX = 1 << 63
"""Nobody counts so far; the next number must fit its field."""
_FIELDS = struct.Struct("<4sHBBQQQ32s32sHHIQQ")
_CHECK = struct.Struct("<Q")
_ZERO_KEY = b"\0" * 32


class SlotState(IntEnum):
    """What the bytes of a slot mean."""

    FREE = 0
    WRITING = 1
    READY = 2


# What a reader compares, of many headers at once: their words of eight bytes, little-endian.
CHECK_WORD = 0
FORMAT_WORD = 1
PAYLOAD_BYTES_WORD = 4
NAMESPACE_WORDS = slice(5, 9)
BLOCK_HASH_WORDS = slice(9, 13)
GROUP_WORD = 13
"""The group alone: the pid behind it is zero in a ready slot."""
READY_FORMAT = np.frombuffer(
    struct.pack("<4sHBB", MAGIC, FORMAT_VERSION, SlotState.READY, 0), dtype=np.uint64
)
"""Magic, version and state of every ready slot."""


@dataclass(frozen=True, slots=True)
class SlotHeader:
    """One header, read and checked."""

    state: SlotState
    generation: int
    lease_id: int
    payload_bytes: int
    key: BlockKey | None
    """None of a free slot."""
    pid: int
    sequence: int


def pack_header(header: SlotHeader, digests: bytes | memoryview = b"") -> bytes:
    """The ``HEADER_BYTES`` in front of a slot.

    Args:
        header: What to write.
        digests: Those behind it, ``DIGEST_BYTES`` each; they count for a ready slot only.
    """
    key = header.key
    fields = _FIELDS.pack(
        MAGIC,
        FORMAT_VERSION,
        header.state,
        0,
        header.generation,
        header.lease_id,
        header.payload_bytes,
        _ZERO_KEY if key is None else key.namespace,
        _ZERO_KEY if key is None else key.block_hash,
        0 if key is None else key.group_idx,
        0,
        header.pid,
        header.sequence,
        0,
    )
    check = xxhash.xxh3_64(fields)
    if header.state is SlotState.READY:
        check.update(digests)
    return _CHECK.pack(check.intdigest()) + fields


def unpack_header(data: bytes | memoryview) -> SlotHeader | None:
    """Read a header; None if it is torn, rotten, of another version, or never written.

    Args:
        data: The header and the digests behind it.
    """
    magic, version, state, _, generation, lease_id, payload, namespace, block_hash, group_idx, _, \
        pid, sequence, _ = _FIELDS.unpack_from(data, CHECK_BYTES)  # fmt: skip
    if magic != MAGIC or version != FORMAT_VERSION or state > SlotState.READY:
        return None
    if sequence > SEQUENCE_MAX:
        return None
    covered = data[CHECK_BYTES:] if state == SlotState.READY else data[CHECK_BYTES:HEADER_BYTES]
    if _CHECK.unpack_from(data)[0] != xxhash.xxh3_64_intdigest(covered):
        return None
    key = None
    if state != SlotState.FREE:
        key = BlockKey(Namespace(namespace), BlockHash(block_hash), group_idx)
    return SlotHeader(SlotState(state), generation, lease_id, payload, key, pid, sequence)
