"""What stands on the disk about each value: a header of 128 bytes per slot, behind one page.

    | the folder's page, 4 KiB | header of slot 0 | header of slot 1 | ...

A header:

    offset  bytes  field
    0       8      XXH3-64 of all that follows
    8       4      magic "KVKD"
    12      2      version of this format
    14      2      group
    16      8      slot: a header that lies elsewhere is none
    24      8      sequence: grows with every value written
    32      8      bytes of the value
    40      32     namespace
    72      32     block hash
    104     16     XXH3-128 of the value
    120     2      where in its slot the value begins, in bytes
    122     6      zero

A free slot's header is all zeros. Pure functions: whatever the bytes, they answer.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from kvkeep.model.errors import InputError
from kvkeep.model.ids import BlockHash, BlockKey, Namespace
from kvkeep.tiers.base import VALUE_BYTES_MAX

PAGE_BYTES = 4096
"""What direct I/O is aligned to: no device in use asks for more."""
ENTRY_BYTES = 128
FORMAT_VERSION = 1
SEQUENCE_MAX = 1 << 63
"""Nobody counts so far; the next number must fit its field."""
SLOTS_MAX = 1 << 22
"""The index keeps about half a kilobyte on each: 2 GiB."""
SEGMENTS_FIT = 128
"""Segments of a capacity that is given to an empty folder; it may grow to four times as many."""
SEGMENTS_MAX = 512
"""Each keeps a file open; a process may have 1024 where nobody raised the limit."""

_MAGIC = b"KVKD"
_FIELDS = struct.Struct("<4sHHQQQ32s32s16sH6x")
_CHECK = struct.Struct("<Q")
_FOLDER_MAGIC = b"kvkeep disk tier"
_FOLDER = struct.Struct("<16sIQQ")
"""Magic, version of this format, bytes of a slot, slots of a segment; XXH3-64 of these behind."""


def round_up(num_bytes: int) -> int:
    """To whole pages."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Geometry:
    """How the segment files are cut; it stays as long as the folder's values do."""

    slot_bytes: int
    slots_per_segment: int

    @staticmethod
    def fit(capacity_bytes: int, value_bytes_max: int, segment_bytes: int) -> "Geometry":
        """For values up to ``value_bytes_max``, with room to begin anywhere in their first page.

        Raises:
            InputError: The capacity holds no value, or too many, or values may not be so long.
        """
        if not 0 < value_bytes_max <= VALUE_BYTES_MAX:
            raise InputError(f"value_bytes_max must be between 1 and {VALUE_BYTES_MAX}")
        slot_bytes = round_up(value_bytes_max + PAGE_BYTES - 1)
        if capacity_bytes < slot_bytes:
            raise InputError(
                f"{capacity_bytes} bytes of disk hold no value of {value_bytes_max} bytes: "
                f"give it {slot_bytes} at least"
            )
        if capacity_bytes // slot_bytes > SLOTS_MAX:
            raise InputError(
                f"{capacity_bytes} bytes of disk hold more than {SLOTS_MAX} values of "
                f"{value_bytes_max} bytes: give it {SLOTS_MAX * slot_bytes} at most"
            )
        segment_bytes = max(segment_bytes, -(-capacity_bytes // SEGMENTS_FIT))
        return Geometry(slot_bytes, max(1, segment_bytes // slot_bytes))


def pack_geometry(geometry: Geometry) -> bytes:
    """The folder's page: ``PAGE_BYTES``."""
    fields = _FOLDER.pack(
        _FOLDER_MAGIC, FORMAT_VERSION, geometry.slot_bytes, geometry.slots_per_segment
    )
    page = fields + _CHECK.pack(xxhash.xxh3_64_intdigest(fields))
    return page.ljust(PAGE_BYTES, b"\0")


def unpack_geometry(page: bytes) -> Geometry | None:
    """Read the folder's page; None if it is torn, rotten, or of another version."""
    if len(page) < _FOLDER.size + _CHECK.size:
        return None
    magic, version, slot_bytes, slots_per_segment = _FOLDER.unpack_from(page)
    if magic != _FOLDER_MAGIC or version != FORMAT_VERSION:
        return None
    if _CHECK.unpack_from(page, _FOLDER.size)[0] != xxhash.xxh3_64_intdigest(page[: _FOLDER.size]):
        return None
    return Geometry(slot_bytes, slots_per_segment)


@dataclass(frozen=True, slots=True)
class Entry:
    """One value, as its header describes it."""

    key: BlockKey
    value_bytes: int
    digest: bytes
    """XXH3-128 of the value."""
    sequence: int
    start: int = 0
    """Where in its slot the value begins: 0 to ``PAGE_BYTES`` - 1."""


def pack_entry(slot: int, entry: Entry) -> bytes:
    """The ``ENTRY_BYTES`` that stand for this value in this slot."""
    key = entry.key
    fields = _FIELDS.pack(
        _MAGIC,
        FORMAT_VERSION,
        key.group_idx,
        slot,
        entry.sequence,
        entry.value_bytes,
        key.namespace,
        key.block_hash,
        entry.digest,
        entry.start,
    )
    return _CHECK.pack(xxhash.xxh3_64_intdigest(fields)) + fields


def unpack_entry(slot: int, data: bytes) -> Entry | None:
    """Read the header of a slot; None if it is free, torn, rotten or another slot's."""
    if len(data) != ENTRY_BYTES:
        return None
    magic, version, group_idx, own_slot, sequence, value_bytes, namespace, block_hash, digest, \
        start = _FIELDS.unpack_from(data, _CHECK.size)  # fmt: skip
    if magic != _MAGIC or version != FORMAT_VERSION or own_slot != slot:
        return None
    if sequence > SEQUENCE_MAX or start >= PAGE_BYTES:
        return None
    if _CHECK.unpack_from(data)[0] != xxhash.xxh3_64_intdigest(data[_CHECK.size :]):
        return None
    key = BlockKey(Namespace(namespace), BlockHash(block_hash), group_idx)
    return Entry(key, value_bytes, digest, sequence, start)


def find_entries(first_slot: int, table: bytes) -> Iterator[tuple[int, Entry | None]]:
    """Every header of a table that is not free, with its slot; None for one that says nothing.

    Args:
        first_slot: The slot of the table's first header.
        table: Headers, one behind the other; the last may be cut.
    """
    num_slots = len(table) // ENTRY_BYTES
    if num_slots == 0:
        return
    words = np.frombuffer(table, dtype=np.uint64, count=num_slots * ENTRY_BYTES // 8)
    is_used = words.reshape(num_slots, ENTRY_BYTES // 8).any(axis=1)
    for row in np.flatnonzero(is_used).tolist():
        slot = first_slot + row
        yield slot, unpack_entry(slot, table[row * ENTRY_BYTES : (row + 1) * ENTRY_BYTES])
