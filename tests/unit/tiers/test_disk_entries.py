"""How a folder is cut, and what is read from its headers."""

import pytest

from kvkeep.model.errors import InputError
from kvkeep.testing.tier_contract import block_key
from kvkeep.tiers.disk.entries import (
    ENTRY_BYTES,
    PAGE_BYTES,
    SEGMENTS_FIT,
    Entry,
    Geometry,
    find_entries,
    pack_entry,
    pack_geometry,
)


def entry(number: int) -> Entry:
    """A header with a value in every field."""
    return Entry(block_key(number, group_idx=3), 4096 + number, bytes(range(16)), number, 17)


def test_lengths_are_fixed() -> None:
    """A header and the folder's page take their room, no more and no less."""
    assert len(pack_entry(0, entry(1))) == ENTRY_BYTES
    assert len(pack_geometry(Geometry(8192, 4))) == PAGE_BYTES


def test_a_table_is_read_in_order() -> None:
    """Free slots are left out, rotten headers are reported, a cut one is ignored."""
    rotten = bytearray(pack_entry(12, entry(2)))
    rotten[50] ^= 1
    table = [pack_entry(10, entry(1)), bytes(ENTRY_BYTES), bytes(rotten), pack_entry(13, entry(3))]

    found = list(find_entries(10, b"".join(table) + pack_entry(14, entry(4))[:100]))
    assert found == [(10, entry(1)), (12, None), (13, entry(3))]


def test_a_slot_has_room_for_any_beginning() -> None:
    """The longest value may begin at the last byte of its first page."""
    geometry = Geometry.fit(1 << 30, 4 << 20, 256 << 20)

    assert geometry == Geometry((4 << 20) + PAGE_BYTES, 63)


def test_few_segments_hold_a_large_capacity() -> None:
    """Each keeps a file open."""
    geometry = Geometry.fit(1 << 40, 4 << 20, 256 << 20)

    num_slots = (1 << 40) // geometry.slot_bytes
    assert -(-num_slots // geometry.slots_per_segment) <= SEGMENTS_FIT + 1


def test_a_capacity_below_one_value_is_refused() -> None:
    """The message says how much would do."""
    with pytest.raises(InputError, match="give it 8192 at least"):
        Geometry.fit(8191, 4097, 1 << 20)
