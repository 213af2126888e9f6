"""Headers and pages of the disk tier: what is written comes back, what is damaged is seen."""

import itertools
import mmap

from hypothesis import given
from hypothesis import strategies as st

from kvkeep.model.ids import BlockHash, BlockKey, Namespace
from kvkeep.tiers.disk.entries import (
    ENTRY_BYTES,
    PAGE_BYTES,
    SEQUENCE_MAX,
    Entry,
    Geometry,
    find_entries,
    pack_entry,
    pack_geometry,
    round_up,
    unpack_entry,
    unpack_geometry,
)
from kvkeep.tiers.disk.pieces import choose_start, find_route, leading

keys = st.builds(
    BlockKey,
    st.binary(min_size=32, max_size=32).map(Namespace),
    st.binary(min_size=32, max_size=32).map(BlockHash),
    st.integers(0, 0xFFFF),
)
entries = st.builds(
    Entry,
    key=keys,
    value_bytes=st.integers(0, 1 << 30),
    digest=st.binary(min_size=16, max_size=16),
    sequence=st.integers(0, SEQUENCE_MAX),
    start=st.integers(0, PAGE_BYTES - 1),
)
slots = st.integers(0, 2**32)
cuts = st.lists(st.integers(0, 5 * PAGE_BYTES), max_size=5)


@given(slot=slots, entry=entries)
def test_a_header_comes_back(slot: int, entry: Entry) -> None:
    """Every field survives."""
    assert unpack_entry(slot, pack_entry(slot, entry)) == entry


@given(slot=slots, entry=entries, bit=st.integers(0, 8 * ENTRY_BYTES - 1))
def test_a_flipped_bit_makes_a_header_void(slot: int, entry: Entry, bit: int) -> None:
    """Wherever it is."""
    packed = bytearray(pack_entry(slot, entry))
    packed[bit // 8] ^= 1 << bit % 8

    assert unpack_entry(slot, bytes(packed)) is None


@given(slot=slots, other=slots, entry=entries)
def test_a_header_is_bound_to_its_slot(slot: int, other: int, entry: Entry) -> None:
    """What lies in another slot says nothing there."""
    found = unpack_entry(other, pack_entry(slot, entry))

    assert (found == entry) == (slot == other)


@given(data=st.binary(max_size=4 * ENTRY_BYTES), slot=slots)
def test_foreign_bytes_are_no_headers(data: bytes, slot: int) -> None:
    """Bytes from elsewhere are neither an entry nor a crash, in a table or alone."""
    assert unpack_entry(slot, data) is None
    assert all(entry is None for _, entry in find_entries(slot, data))


@given(data=st.binary(max_size=PAGE_BYTES))
def test_foreign_bytes_are_no_folder(data: bytes) -> None:
    """A page that nobody here wrote names no geometry."""
    assert unpack_geometry(data) is None


@given(
    slot_bytes=st.integers(1, 2**63),
    slots_per_segment=st.integers(1, 2**63),
    bit=st.integers(0, 8 * 44 - 1),
)
def test_a_flipped_bit_makes_a_folder_void(
    slot_bytes: int, slots_per_segment: int, bit: int
) -> None:
    """The page says how the folder is cut, or nothing."""
    geometry = Geometry(slot_bytes, slots_per_segment)
    page = bytearray(pack_geometry(geometry))
    assert unpack_geometry(bytes(page)) == geometry
    page[bit // 8] ^= 1 << bit % 8

    assert unpack_geometry(bytes(page)) is None


def _parts(memory: memoryview, cuts: list[int]) -> list[memoryview]:
    """Cut memory at these offsets."""
    ends = sorted({min(cut, len(memory)) for cut in cuts} | {0, len(memory)})
    return [memory[begin:end] for begin, end in itertools.pairwise(ends)]


def _memory(num_bytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, num_bytes))


@given(
    num_bytes=st.integers(1, 5 * PAGE_BYTES),
    write_cuts=cuts,
    read_cuts=cuts,
    write_shift=st.integers(0, PAGE_BYTES - 1),
    read_shift=st.integers(0, PAGE_BYTES - 1),
)
def test_a_value_comes_back_however_it_is_cut(
    num_bytes: int, write_cuts: list[int], read_cuts: list[int], write_shift: int, read_shift: int
) -> None:
    """Written from some pieces, read into others: same bytes, and only whole aligned pages move."""
    room = round_up(num_bytes) + 2 * PAGE_BYTES
    source, target, scratch, disk = (_memory(room) for _ in range(4))
    pattern = bytes(idx * 31 % 251 for idx in range(num_bytes))
    source[write_shift : write_shift + num_bytes] = pattern
    value = leading(_parts(source[write_shift : write_shift + num_bytes], write_cuts), num_bytes)
    into = leading(_parts(target[read_shift : read_shift + num_bytes], read_cuts), num_bytes)

    start = choose_start(value)
    written = find_route(value, start, scratch)
    written.fill_scratch()
    position = 0
    for view in written.iovecs:
        assert view.nbytes % PAGE_BYTES == 0
        disk[position : position + view.nbytes] = view
        position += view.nbytes
    taken = find_route(into, start, scratch)
    position = 0
    for view in taken.iovecs:
        view[:] = disk[position : position + view.nbytes]
        position += view.nbytes
    taken.empty_scratch()

    assert bytes(target[read_shift : read_shift + num_bytes]) == pattern
    assert not any(target[:read_shift])
    assert not any(target[read_shift + num_bytes :])
