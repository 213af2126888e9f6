"""What moves without a copy."""

import mmap
import os
from pathlib import Path

import pytest

from kvkeep.tiers.disk.entries import PAGE_BYTES
from kvkeep.tiers.disk.pieces import choose_start, find_route, leading, move_all


@pytest.fixture
def memory() -> memoryview:
    """Sixteen aligned pages."""
    return memoryview(mmap.mmap(-1, 16 * PAGE_BYTES))


@pytest.fixture
def scratch() -> memoryview:
    """As much again."""
    return memoryview(mmap.mmap(-1, 16 * PAGE_BYTES))


def test_an_aligned_value_moves_in_one_piece(memory: memoryview, scratch: memoryview) -> None:
    """A slot of the pool: nothing is copied."""
    value = [memory[: 4 * PAGE_BYTES]]

    assert choose_start(value) == 0
    route = find_route(value, 0, scratch)
    assert [view.nbytes for view in route.iovecs] == [4 * PAGE_BYTES]
    assert route.copies == []


def test_only_what_stands_before_a_slot_is_copied(memory: memoryview, scratch: memoryview) -> None:
    """A wrapper's few bytes do not push the slot off its pages."""
    value = [memory[100:164], memory[PAGE_BYTES : 5 * PAGE_BYTES]]

    start = choose_start(value)
    assert start == PAGE_BYTES - 64
    route = find_route(value, start, scratch)
    assert [piece.nbytes for piece, _ in route.copies] == [64]
    assert [view.nbytes for view in route.iovecs] == [PAGE_BYTES, 4 * PAGE_BYTES]


def test_unaligned_memory_is_copied_at_its_edges_only(
    memory: memoryview, scratch: memoryview
) -> None:
    """The value begins in its slot as it does in its page of memory."""
    value = [memory[1000 : 1000 + 6 * PAGE_BYTES]]

    start = choose_start(value)
    assert start == 1000
    route = find_route(value, start, scratch)
    assert sum(piece.nbytes for piece, _ in route.copies) == PAGE_BYTES


def test_a_reader_with_other_alignment_copies_all(memory: memoryview, scratch: memoryview) -> None:
    """Slower, and the same bytes."""
    route = find_route([memory[8 : 8 + 4 * PAGE_BYTES]], 0, scratch)

    assert sum(piece.nbytes for piece, _ in route.copies) == 4 * PAGE_BYTES


def test_room_is_cut_to_the_value(memory: memoryview) -> None:
    """Empty parts, and parts behind its end, are left out."""
    room = [memory[:10], memory[10:10], memory[10:30], memory[30:40]]

    assert [part.nbytes for part in leading(room, 15)] == [10, 5]


def test_a_system_that_moves_little_at_a_time(tmp_path: Path) -> None:
    """Short writes and reads are continued; the end of the file ends them."""
    path = tmp_path / "file"
    pieces = [memoryview(bytes([number]) * 7) for number in range(5)]
    fd = os.open(path, os.O_RDWR | os.O_CREAT)

    def short_write(fd: int, views: "list[memoryview]", offset: int) -> int:
        return os.pwrite(fd, views[0][:3], offset)

    assert move_all(short_write, fd, pieces, 2) == 35  # type: ignore[arg-type]
    into = [memoryview(bytearray(20)) for _ in range(2)]
    assert move_all(os.preadv, fd, into, 2) == 35
    os.close(fd)
    assert b"".join(into)[:35] == b"".join(pieces)
