"""The header in front of every slot of the pool, and the file's own first page.

    offset  bytes  field
    0       4      magic "KVKS"
    4       2      version of this format
    6       1      state: 0 free, 1 writing, 2 ready
    7       1      zero
    8       8      generation of the daemon that wrote it
    16      8      write lease
    24      8      payload bytes
    32      32     namespace
    64      32     block hash
    96      2      group
    98      2      zero
    100     4      pid of the writer
    104     8      sequence: grows with every header written
    112     8      XXH3-64 of bytes 0..111
    120     8      zero
    128     16 n   XXH3-128 of each head page, canonical byte order

Only the daemon writes the first 128 bytes; only the holder of the write lease writes the digests.
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
_FIELDS = struct.Struct("<4sHBBQQQ32s32sHHIQ")
_CHECK = struct.Struct("<Q")
_ZERO_KEY = b"\0" * 32

KEY_DTYPE = np.dtype(
    {
        "names": ["state", "payload_bytes", "namespace", "block_hash", "group_idx"],
        "formats": ["u1", "<u8", "V32", "V32", "<u2"],
        "offsets": [6, 24, 32, 64, 96],
        "itemsize": HEADER_BYTES,
    }
)
"""What a reader compares, of many headers at once."""


class SlotState(IntEnum):
    """What the bytes of a slot mean."""

    FREE = 0
    WRITING = 1
    READY = 2


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


def pack_header(header: SlotHeader) -> bytes:
    """The first 120 bytes of a slot's header."""
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
    )
    return fields + _CHECK.pack(xxhash.xxh3_64_intdigest(fields))


def unpack_header(data: bytes | memoryview) -> SlotHeader | None:
    """Read a header; None if it is torn, rotten, of another version, or never written."""
    fields = bytes(data[: _FIELDS.size])
    magic, version, state, _, generation, lease_id, payload, namespace, block_hash, group_idx, _, \
        pid, sequence = _FIELDS.unpack(fields)  # fmt: skip
    if magic != MAGIC or version != FORMAT_VERSION or state > SlotState.READY:
        return None
    if _CHECK.unpack_from(data, _FIELDS.size)[0] != xxhash.xxh3_64_intdigest(fields):
        return None
    key = None
    if state != SlotState.FREE:
        key = BlockKey(Namespace(namespace), BlockHash(block_hash), group_idx)
    return SlotHeader(SlotState(state), generation, lease_id, payload, key, pid, sequence)
