"""The disk tier over restarts, and what it says when it can't have its folder."""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kvkeep.core.eviction.base import EvictionPolicy
from kvkeep.core.eviction.lru import LruPolicy
from kvkeep.model.errors import InputError
from kvkeep.testing.tier_contract import block_key, in_parts, read, value_bytes, write
from kvkeep.tiers.disk import entries
from kvkeep.tiers.disk.tier import DiskOptions, DiskTier

VALUE_BYTES = 10_000
SLOT_BYTES = 16384
SEGMENT_SLOTS = 4


class Opened:
    """Makes tiers on one folder; the last one is closed at the end of the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tier: DiskTier | None = None

    def __call__(
        self,
        num_slots: int = 8,
        *,
        value_bytes_max: int = VALUE_BYTES,
        policy: Callable[[int], EvictionPolicy] = lambda _: LruPolicy(),
        segment_slots: int = SEGMENT_SLOTS,
        may_be_direct: bool = True,
    ) -> DiskTier:
        """Close the tier before, as the end of its process does, and open another."""
        self.close()
        self._tier = DiskTier(
            self.folder,
            num_slots * SLOT_BYTES,
            value_bytes_max,
            policy=policy,
            options=DiskOptions(
                segment_bytes=segment_slots * SLOT_BYTES, may_be_direct=may_be_direct
            ),
        )
        return self._tier

    def close(self) -> None:
        """Close the tier, if there is one."""
        if self._tier is not None:
            self._tier.close()
            self._tier = None

    def segments(self) -> list[str]:
        """Names of the segment files."""
        return sorted(path.name for path in self.folder.glob("segment-*"))


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """Tiers on a new folder."""
    opened = Opened(tmp_path / "tier")
    yield opened
    opened.close()


def write_in_turn(tier: DiskTier, numbers: Sequence[int]) -> None:
    """One after the other, so that their slots and ages are in order."""
    for number in numbers:
        assert write(tier, [number], VALUE_BYTES) == [True]


def found(tier: DiskTier, numbers: Sequence[int]) -> list[int]:
    """Which of these values are there, whole; a wrong byte fails the test."""
    values = read(tier, [block_key(number) for number in numbers], VALUE_BYTES)
    for number, value in zip(numbers, values, strict=True):
        assert value in (None, value_bytes(number, VALUE_BYTES))
    return [number for number, value in zip(numbers, values, strict=True) if value is not None]


def test_values_outlive_the_process(opened: Opened) -> None:
    """What was written is there again, by key and in number."""
    assert all(write(opened(), range(6), VALUE_BYTES))

    tier = opened()
    assert found(tier, range(8)) == list(range(6))
    assert tier.use().num_values == 6


def test_a_deleted_value_stays_deleted(opened: Opened) -> None:
    """Also after a restart."""
    tier = opened()
    write(tier, range(4), VALUE_BYTES)
    tier.delete([block_key(1), block_key(2)])

    assert found(opened(), range(4)) == [0, 3]


def test_an_evicted_value_stays_evicted(opened: Opened) -> None:
    """And the newest are kept; order of age outlives the process."""
    write_in_turn(opened(), range(8))
    write_in_turn(opened(), [8, 9])

    assert found(opened(), range(10)) == list(range(2, 10))


def test_segments_come_as_they_are_needed(opened: Opened) -> None:
    """Four values fit one; a fifth asks for the second."""
    tier = opened()
    write(tier, range(4), VALUE_BYTES)
    assert opened.segments() == ["segment-0000.kvkeep"]
    write(tier, [4], VALUE_BYTES)

    assert opened.segments() == ["segment-0000.kvkeep", "segment-0001.kvkeep"]
    path = opened.folder / "segment-0001.kvkeep"
    assert path.stat().st_size == path.stat().st_blocks * 512 == SEGMENT_SLOTS * SLOT_BYTES


def test_a_larger_capacity_keeps_the_values(opened: Opened) -> None:
    """The last segment is lengthened, and more may follow."""
    write(opened(6), range(6), VALUE_BYTES)
    tier = opened(11)
    assert all(write(tier, range(6, 11), VALUE_BYTES))

    assert found(opened(11), range(11)) == list(range(11))


def test_a_smaller_capacity_keeps_what_fits(opened: Opened) -> None:
    """Segments beyond it are given back to the disk."""
    write_in_turn(opened(8), range(8))
    tier = opened(3)

    assert found(tier, range(8)) == [0, 1, 2]
    assert opened.segments() == ["segment-0000.kvkeep"]
    assert (opened.folder / "segment-0000.kvkeep").stat().st_size == 3 * SLOT_BYTES
    assert tier.use().capacity_bytes == 3 * SLOT_BYTES


def test_another_size_of_segments_changes_nothing(opened: Opened) -> None:
    """A folder stays cut as it is while its values fit."""
    write_in_turn(opened(8), range(8))

    assert found(opened(8, segment_slots=2), range(8)) == list(range(8))


def test_values_of_another_size_are_dropped(
    opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    """With one line in the log; the folder works on."""
    write(opened(), range(4), VALUE_BYTES)
    with caplog.at_level(logging.WARNING):
        tier = opened(4, value_bytes_max=2 * VALUE_BYTES)

    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert found(tier, range(4)) == []
    assert write(tier, [1], 2 * VALUE_BYTES) == [True]


def test_a_folder_of_another_version_is_dropped(
    opened: Opened, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one line in the log; the folder works on."""
    with monkeypatch.context() as patched:
        patched.setattr(entries, "FORMAT_VERSION", entries.FORMAT_VERSION + 1)
        write(opened(), range(4), VALUE_BYTES)
        opened.close()
    with caplog.at_level(logging.WARNING):
        tier = opened()

    assert len(caplog.records) == 1
    assert found(tier, range(4)) == []
    assert all(write(tier, range(4), VALUE_BYTES))


def test_a_new_folder_is_no_news(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is said where nothing was dropped, and the folder is this user's alone."""
    with caplog.at_level(logging.WARNING):
        opened()

    assert caplog.records == []
    assert opened.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in opened.folder.iterdir()} == {0o600}


def test_foreign_files_are_left_alone(opened: Opened) -> None:
    """Only files with the tier's own names are ever deleted."""
    write(opened(), range(4), VALUE_BYTES)
    notes = opened.folder / "segment-notes.txt"
    notes.write_text("mine")
    opened(4, value_bytes_max=2 * VALUE_BYTES)

    assert notes.read_text() == "mine"


def test_direct_and_buffered_read_each_others_values(opened: Opened) -> None:
    """A value may begin anywhere in its first page, however it is read."""
    memory = memoryview(bytearray(8 + VALUE_BYTES))
    tier = opened(may_be_direct=True)
    for number in range(4):
        memory[number : number + VALUE_BYTES] = value_bytes(number, VALUE_BYTES)
        tier.write([block_key(number)], [[memory[number : number + VALUE_BYTES]]])

    tier = opened(may_be_direct=False)
    assert not tier.is_direct
    assert found(tier, range(4)) == list(range(4))
    write(tier, range(4, 8), VALUE_BYTES)
    assert found(opened(may_be_direct=True), range(8)) == list(range(8))


def test_a_locked_folder_is_one_sentence(opened: Opened) -> None:
    """A second tier on the folder is refused, and the first works on."""
    tier = opened()
    with pytest.raises(InputError, match="another process uses the disk tier's folder"):
        DiskTier(opened.folder, 8 * SLOT_BYTES, VALUE_BYTES)

    assert write(tier, [1], VALUE_BYTES) == [True]


@pytest.mark.parametrize(
    ("capacity_bytes", "value_bytes_max", "message"),
    [
        (SLOT_BYTES - 1, VALUE_BYTES, "give it 16384 at least"),
        (1 << 50, VALUE_BYTES, "at most"),
        (1 << 30, 0, "value_bytes_max must be between"),
        (1 << 40, (1 << 30) + 1, "value_bytes_max must be between"),
    ],
)
def test_senseless_sizes_are_one_sentence(
    tmp_path: Path, capacity_bytes: int, value_bytes_max: int, message: str
) -> None:
    """The message says what would do, and nothing is made."""
    with pytest.raises(InputError, match=message):
        DiskTier(tmp_path / "tier", capacity_bytes, value_bytes_max)

    assert not (tmp_path / "tier").exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    """A path that can't be had is one sentence."""
    (tmp_path / "tier").write_text("")
    with pytest.raises(InputError, match="can't be used"):
        DiskTier(tmp_path / "tier", 1 << 30, VALUE_BYTES)


def test_a_longer_value_is_declined(opened: Opened) -> None:
    """It has no slot; the others of its batch are kept."""
    tier = opened()
    long = bytes(VALUE_BYTES + 1)
    values = [in_parts(value_bytes(1, VALUE_BYTES)), in_parts(long)]

    assert tier.write([block_key(1), block_key(2)], values) == [True, False]


def test_the_policy_is_the_callers(opened: Opened) -> None:
    """It is told of the slots there are, and its victim goes."""

    class NewestFirst(LruPolicy):
        def victims(self, num_slots: int, is_evictable: Callable[[int], bool]) -> list[int]:
            return super().victims(1 << 30, is_evictable)[::-1][:num_slots]

    told: list[int] = []

    def policy(num_slots: int) -> EvictionPolicy:
        told.append(num_slots)
        return NewestFirst()

    tier = opened(8, policy=policy)
    write(tier, range(8), VALUE_BYTES)
    write(tier, [8], VALUE_BYTES)

    assert told == [8]
    assert len(found(tier, range(8))) == 7
    assert found(tier, [8]) == [8]


def test_a_value_being_read_is_not_overwritten(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader stopped in mid-read gets its bytes, though room is short meanwhile."""
    tier = opened(2, segment_slots=2)
    write(tier, [0], VALUE_BYTES)
    write(tier, [1], VALUE_BYTES)
    reached, proceed = threading.Event(), threading.Event()
    whole = os.preadv

    def stopping(fd: int, views: Sequence[memoryview], offset: int) -> int:
        reached.set()
        assert proceed.wait(30)
        return whole(fd, views, offset)

    monkeypatch.setattr(os, "preadv", stopping)
    answers: list[list[int]] = []
    reader = threading.Thread(target=lambda: answers.append(found(tier, [0])))
    reader.start()
    assert reached.wait(30)
    # Touched, so that value 0 is the oldest: only its reader keeps it from going.
    assert write(tier, [1], VALUE_BYTES) == [True]
    assert write(tier, [2], VALUE_BYTES) == [True]
    assert write(tier, [3], VALUE_BYTES) == [True]
    tier.delete([block_key(0)])
    proceed.set()
    reader.join()
    monkeypatch.undo()

    assert answers == [[0]]
    assert found(tier, range(4)) == [3]


def test_with_all_slots_pinned_a_write_is_declined(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no room that could be made, and nothing waits."""
    tier = opened(1, segment_slots=1)
    write(tier, [0], VALUE_BYTES)
    whole = os.preadv
    declined: list[list[bool]] = []

    def writing(fd: int, views: Sequence[memoryview], offset: int) -> int:
        declined.append(write(tier, [1], VALUE_BYTES))
        return whole(fd, views, offset)

    monkeypatch.setattr(os, "preadv", writing)

    assert found(tier, [0]) == [0]
    assert declined == [[False]]
