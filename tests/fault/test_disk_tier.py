"""What the disk does to the disk tier: full, failing, read-only, cut and flipped.

A full disk is a small tmpfs and a small ext4; a read-only one is that ext4 after it gave up. Errors
of the device (EIO) come from a shim in place of ``os.preadv`` and ``os.pwritev``: no block device
that fails on request can be made everywhere.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kvkeep.model.errors import UnavailableError
from kvkeep.testing.tier_contract import block_key, value_bytes, write
from kvkeep.testing.virtual_time import VirtualTime
from kvkeep.tiers.disk.entries import ENTRY_BYTES, PAGE_BYTES
from kvkeep.tiers.disk.tier import DiskTier
from tests.fault.disk_tiers import OPTIONS, SLOT_BYTES, VALUE_BYTES, found, new_tier
from tests.fault.small_disks import fill, small_ext4, small_tmpfs

RETRY_S = OPTIONS.grow_retry_s


def filled_tier(folder: Path) -> DiskTier:
    """Values 0 to 5, each in the slot of its number."""
    tier = new_tier(folder)
    for number in range(6):
        assert write(tier, [number], VALUE_BYTES) == [True]
    return tier


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[DiskTier]:
    """Values 0 to 5, each in the slot of its number."""
    tier = filled_tier(tmp_path / "tier")
    yield tier
    tier.close()


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """Change bytes behind the tier's back."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
        os.fsync(file.fileno())


def peek(path: Path, offset: int, num_bytes: int) -> bytes:
    """Read bytes behind the tier's back."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(num_bytes)


def flip(path: Path, offset: int) -> None:
    """Turn one bit over."""
    overwrite(path, offset, bytes([peek(path, offset, 1)[0] ^ 0x10]))


# --- Rot -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 7, VALUE_BYTES // 2, VALUE_BYTES - 1])
def test_a_flipped_bit_in_a_value_is_a_miss(tier: DiskTier, tmp_path: Path, place: int) -> None:
    """The value is dropped, the others stay, and it can be written again."""
    segment = tmp_path / "tier" / "segment-0000.kvkeep"
    slot = peek(segment, 2 * SLOT_BYTES, SLOT_BYTES)
    flip(segment, 2 * SLOT_BYTES + slot.index(value_bytes(2, VALUE_BYTES)) + place)

    assert found(tier, range(6)) == [0, 1, 3, 4, 5]
    assert tier.num_rotten == 1
    assert tier.lookup([block_key(2)]) == [False]
    assert write(tier, [2], VALUE_BYTES) == [True]
    assert found(tier, range(6)) == list(range(6))


@pytest.mark.parametrize("place", [0, 9, 20, 33, 40, 104, 120])
@pytest.mark.parametrize("is_running", [True, False])
def test_a_flipped_bit_in_a_header_is_a_miss(tmp_path: Path, place: int, is_running: bool) -> None:
    """Under a running tier and before the next: dropped, and the others stay."""
    tier = filled_tier(tmp_path / "tier")
    if not is_running:
        tier.close()
    flip(tmp_path / "tier" / "headers.kvkeep", PAGE_BYTES + 2 * ENTRY_BYTES + place)
    if not is_running:
        tier = new_tier(tmp_path / "tier")

    with contextlib.closing(tier):
        assert found(tier, range(6)) == [0, 1, 3, 4, 5]
        assert write(tier, [2], VALUE_BYTES) == [True]
        assert found(tier, range(6)) == list(range(6))


def test_swapped_slots_are_misses(tier: DiskTier, tmp_path: Path) -> None:
    """Another value's bytes are no answer, whole as they may be."""
    segment = tmp_path / "tier" / "segment-0000.kvkeep"
    one, two = (peek(segment, slot * SLOT_BYTES, SLOT_BYTES) for slot in (1, 2))
    overwrite(segment, SLOT_BYTES, two + one)

    assert found(tier, range(6)) == [0, 3, 4, 5]


def test_slots_swapped_with_their_headers_are_misses(tier: DiskTier, tmp_path: Path) -> None:
    """A header says which slot it stands for."""
    segment, headers = (
        tmp_path / "tier" / name for name in ("segment-0000.kvkeep", "headers.kvkeep")
    )
    one, two = (peek(segment, slot * SLOT_BYTES, SLOT_BYTES) for slot in (1, 2))
    overwrite(segment, SLOT_BYTES, two + one)
    places = [PAGE_BYTES + slot * ENTRY_BYTES for slot in (1, 2)]
    one, two = (peek(headers, place, ENTRY_BYTES) for place in places)
    overwrite(headers, places[0], two + one)

    assert found(tier, range(6)) == [0, 3, 4, 5]


def test_a_segment_cut_under_a_running_tier(tier: DiskTier, tmp_path: Path) -> None:
    """What was cut off is a miss, what is left is read, and new values find room."""
    os.truncate(tmp_path / "tier" / "segment-0000.kvkeep", 2 * SLOT_BYTES + 5000)

    assert found(tier, range(6)) == [0, 1, 4, 5]
    assert all(write(tier, range(6, 10), VALUE_BYTES))
    assert set(range(6, 10)) <= set(found(tier, range(10)))


def test_everything_removed_under_a_running_tier(tier: DiskTier, tmp_path: Path) -> None:
    """It works on with the files it has open; the next tier begins anew."""
    for path in (tmp_path / "tier").iterdir():
        path.unlink()

    assert found(tier, range(6)) == list(range(6))
    tier.delete([block_key(0)])
    assert write(tier, [6], VALUE_BYTES) == [True]
    after = new_tier(tmp_path / "tier")
    with contextlib.closing(after):
        assert found(after, range(7)) == []
        assert all(write(after, range(7), VALUE_BYTES))


def test_headers_cut_under_a_running_tier(tier: DiskTier, tmp_path: Path) -> None:
    """A value without its header is a miss; new ones are kept."""
    os.truncate(tmp_path / "tier" / "headers.kvkeep", PAGE_BYTES + 3 * ENTRY_BYTES + 60)

    assert found(tier, range(6)) == [0, 1, 2]
    assert all(write(tier, range(6, 10), VALUE_BYTES))
    assert found(tier, range(10)) == [0, 1, 2, 6, 7, 8, 9]


@pytest.mark.parametrize("num_bytes", [0, 100, 2 * SLOT_BYTES + 5000])
def test_a_segment_cut_between_two_processes(tmp_path: Path, num_bytes: int) -> None:
    """What was cut off is not even listed; the file is whole again."""
    folder = tmp_path / "tier"
    with contextlib.closing(new_tier(folder)) as before:
        for number in range(6):
            write(before, [number], VALUE_BYTES)
    os.truncate(folder / "segment-0000.kvkeep", num_bytes)

    with contextlib.closing(new_tier(folder)) as after:
        kept = [*range(num_bytes // SLOT_BYTES), 4, 5]
        assert [n for n in range(6) if after.lookup([block_key(n)]) == [True]] == kept
        assert found(after, range(6)) == kept
        assert all(write(after, range(8), VALUE_BYTES))
        assert found(after, range(8)) == list(range(8))


def test_a_segment_removed_between_two_processes(tmp_path: Path) -> None:
    """Its values are gone, also for good, and its room is used again."""
    folder = tmp_path / "tier"
    with contextlib.closing(new_tier(folder)) as before:
        for number in range(8):
            write(before, [number], VALUE_BYTES)
    (folder / "segment-0000.kvkeep").unlink()

    with contextlib.closing(new_tier(folder)) as after:
        assert found(after, range(8)) == [4, 5, 6, 7]
        assert write(after, [8], VALUE_BYTES) == [True]
    with contextlib.closing(new_tier(folder)) as again:
        assert found(again, range(9)) == [4, 5, 6, 7, 8]


def test_a_headers_file_of_noise(tmp_path: Path) -> None:
    """A folder whose file of headers was overwritten is begun anew."""
    folder = tmp_path / "tier"
    with contextlib.closing(new_tier(folder)) as before:
        write(before, range(6), VALUE_BYTES)
    (folder / "headers.kvkeep").write_bytes(os.urandom(10_000))

    with contextlib.closing(new_tier(folder)) as after:
        assert found(after, range(6)) == []
        assert all(write(after, range(8), VALUE_BYTES))


# --- A device that fails -------------------------------------------------------------------------


class Shim:
    """Stands for ``os.preadv`` and ``os.pwritev``, and fails as long as it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number = 0
        """The error to raise, if any."""
        for name in ("preadv", "pwritev"):
            monkeypatch.setattr(os, name, self._failing(getattr(os, name)))

    def _failing(self, whole: Callable[..., int]) -> Callable[..., int]:
        def call(fd: int, views: Sequence[memoryview], offset: int) -> int:
            if self.number:
                raise OSError(self.number, os.strerror(self.number))
            return whole(fd, views, offset)

        return call


@pytest.fixture
def shim(tier: DiskTier, monkeypatch: pytest.MonkeyPatch) -> Shim:
    """Around the I/O of a tier that was filled without it."""
    return Shim(monkeypatch)


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.ENODEV])
def test_an_error_of_the_device_is_unavailable(tier: DiskTier, shim: Shim, number: int) -> None:
    """One sentence for a read and for a write; once it is over everything is as before."""
    shim.number = number
    with pytest.raises(UnavailableError, match="the disk can't be read"):
        found(tier, range(6))
    with pytest.raises(UnavailableError, match="the disk can't be written"):
        write(tier, [6], VALUE_BYTES)
    assert tier.lookup([block_key(6)]) == [False]
    shim.number = 0

    assert found(tier, range(7)) == list(range(6))
    assert write(tier, [6, 7], VALUE_BYTES) == [True, True]
    assert found(tier, range(8)) == list(range(8))


def test_a_place_that_fails_twice_is_given_up(tier: DiskTier, shim: Shim) -> None:
    """Its value is a miss from then on, and the place is not written to."""
    shim.number = errno.EIO
    for _ in range(2):
        with pytest.raises(UnavailableError):
            found(tier, [3])
    shim.number = 0

    assert found(tier, range(6)) == [0, 1, 2, 4, 5]
    for number in range(10, 30):
        assert write(tier, [number], VALUE_BYTES) == [True]
    assert tier.use().num_values == 7


def test_a_device_without_room_declines(tier: DiskTier, shim: Shim) -> None:
    """Where even allocated room is gone, writes are declined and reads go on; then all is well."""
    shim.number = errno.ENOSPC
    assert write(tier, [6, 7], VALUE_BYTES) == [False, False]
    shim.number = 0

    assert found(tier, range(8)) == list(range(6))
    assert write(tier, [6, 7], VALUE_BYTES) == [True, True]


def test_a_failed_delete_says_so(tier: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value is gone from this process all the same."""

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", fail)
        with pytest.raises(UnavailableError, match="the disk can't be written"):
            tier.delete([block_key(1), block_key(2)])

    assert found(tier, range(6)) == [0, 3, 4, 5]


# --- A disk that is full, or read-only ------------------------------------------------------------


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Some 16 MiB that are really full at some point; the ext4 turns read-only on its errors."""
    place = tmp_path / "disk"
    is_tmpfs = request.param == "tmpfs"
    with small_tmpfs(place) if is_tmpfs else small_ext4(place, tmp_path / "image"):
        yield place


@pytest.mark.root
def test_a_disk_that_fills_up(small_disk: Path) -> None:
    """The tier lives with what it got: no error, the newest values are read, others make room."""
    numbers = range(300)
    with contextlib.closing(new_tier(small_disk / "tier", 300)) as tier:
        for number in numbers:
            assert write(tier, [number], VALUE_BYTES) == [True]
        kept = found(tier, numbers)

    assert 50 < len(kept) < 250
    assert kept == list(numbers)[-len(kept) :]


@pytest.mark.root
def test_a_disk_full_from_the_start_gets_room_again(small_disk: Path) -> None:
    """Writes are declined while there is no room at all, and kept after, in the same process."""
    clock = VirtualTime()
    with contextlib.closing(new_tier(small_disk / "tier", 40, clock)) as tier:
        assert write(tier, range(4), VALUE_BYTES) == [True] * 4
        fill(small_disk / "filler")
        # No new segment: one value makes room for another, and reads go on.
        assert write(tier, [4], VALUE_BYTES) == [True]
        assert len(found(tier, range(5))) == 4
        (small_disk / "filler").unlink()
        clock.run_until(RETRY_S)
        assert all(write(tier, range(20), VALUE_BYTES))
        assert found(tier, range(20)) == list(range(20))


@pytest.mark.root
def test_a_disk_without_any_room_declines(small_disk: Path) -> None:
    """With not one segment a write is declined, until there is room."""
    clock = VirtualTime()
    with contextlib.closing(new_tier(small_disk / "tier", 40, clock)) as tier:
        fill(small_disk / "filler")
        assert write(tier, range(4), VALUE_BYTES) == [False] * 4
        assert found(tier, range(4)) == []
        (small_disk / "filler").unlink()
        assert write(tier, [1], VALUE_BYTES) == [False]
        clock.run_until(RETRY_S)
        assert write(tier, range(4), VALUE_BYTES) == [True] * 4


@pytest.mark.root
def test_a_full_disk_can_be_opened_again(small_disk: Path) -> None:
    """A restart needs no room."""
    with contextlib.closing(new_tier(small_disk / "tier", 8)) as tier:
        write(tier, range(8), VALUE_BYTES)
    fill(small_disk / "filler")

    with contextlib.closing(new_tier(small_disk / "tier", 8)) as tier:
        assert found(tier, range(8)) == list(range(8))
        assert write(tier, [8], VALUE_BYTES) == [True]


@pytest.mark.root
@pytest.mark.parametrize("small_disk", ["ext4"], indirect=True)
def test_a_file_system_that_turns_read_only(small_disk: Path) -> None:
    """ext4 gives up after an error of its own: reads go on, writes are unavailable."""
    name = next(
        line.split()[0].removeprefix("/dev/")
        for line in Path("/proc/mounts").read_text().splitlines()
        if line.split()[1] == str(small_disk)
    )
    with contextlib.closing(new_tier(small_disk / "tier", 8)) as tier:
        write(tier, range(8), VALUE_BYTES)
        Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("a test")

        assert found(tier, range(8)) == list(range(8))
        with pytest.raises(UnavailableError, match="Read-only file system"):
            write(tier, [8], VALUE_BYTES)
        with pytest.raises(UnavailableError, match="Read-only file system"):
            tier.delete([block_key(3)])
        assert tier.lookup([block_key(3)]) == [False]
