"""Values on the local disk: a folder of preallocated segments, for one process at a time.

A value is written before its header, and a slot's header is cleared before the slot is written to.
So a process that ends at any point, by SIGKILL too, leaves each slot with a header that is true,
or without one. Nothing is flushed: after a power cut the system may have kept a header without its
value or a part of either. The header has a check and the value a digest in the header, both looked
at by every read, so what is torn is a miss.

Every method but ``close`` may be called from several threads; a batch is spread over its own.
"""

import contextlib
import errno
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import xxhash

from kvkeep.core.eviction.base import EvictionPolicy
from kvkeep.core.eviction.lru import LruPolicy
from kvkeep.model.clock import Clock, SystemClock
from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.model.ids import BlockKey
from kvkeep.tiers.base import Parts, TierUse, length_of
from kvkeep.tiers.disk.entries import SEGMENTS_MAX, Entry, Geometry
from kvkeep.tiers.disk.headers import HeaderFile
from kvkeep.tiers.disk.index import SlotIndex
from kvkeep.tiers.disk.pieces import leading
from kvkeep.tiers.disk.segments import Segments, allows_direct, remove_all

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class DiskOptions:
    """What rarely needs another value."""

    num_threads: int = 4
    """Values of one batch that move at once: while one is digested, others keep the disk busy."""
    segment_bytes: int = 256 << 20
    """What is allocated at once: a full disk leaves less than this unused. Larger where there
    would be more than ``SEGMENTS_FIT`` of them."""
    may_be_direct: bool = True
    """Go around the page cache where the file system allows it."""
    grow_retry_s: float = 5.0
    """After the disk had no room for a segment, it is asked again at the earliest."""


def _least_recently_used(_num_slots: int) -> EvictionPolicy:
    return LruPolicy()


class DiskTier:
    """Keeps values in a folder of its own, and evicts by policy when the capacity is used."""

    name = "disk"

    def __init__(
        self,
        folder: Path,
        capacity_bytes: int,
        value_bytes_max: int,
        *,
        policy: Callable[[int], EvictionPolicy] = _least_recently_used,
        options: DiskOptions | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Take the folder, and find what an earlier process left there.

        Args:
            folder: Made if it is not there; readable by this user only.
            capacity_bytes: Size of all segments at most; allocated one by one as they are needed.
            value_bytes_max: Longest value. With another one, what the folder held is dropped.
            policy: Given the number of slots, makes the order in which values go for want of room;
                the least recently used goes first if nothing is said.
            options: See there.
            clock: When the disk was last asked for room.

        Raises:
            InputError: A size makes no sense, the folder can't be used, or another process uses it.
        """
        self._options = options or DiskOptions()
        self._value_bytes_max = value_bytes_max
        self._clock = clock or SystemClock()
        self._sequence = 0
        self._numbers_lock = threading.Lock()
        self._grow_lock = threading.Lock()
        self._grow_at_s = self._clock.now_s()
        self._suspects: set[int] = set()
        """Slots whose last read failed."""
        self.num_rotten = 0
        """Values that were found torn or rotten by reads, and dropped."""
        wanted = Geometry.fit(capacity_bytes, value_bytes_max, self._options.segment_bytes)
        self._num_slots = capacity_bytes // wanted.slot_bytes
        self._index = SlotIndex(policy(self._num_slots))
        self._headers = _open_headers(folder)
        with contextlib.ExitStack() as held, _usable(folder):
            held.callback(self._headers.close)
            self._geometry = self._prepare(folder, wanted)
            segments = Segments(
                folder,
                self._geometry,
                self._num_slots,
                is_direct=self._options.may_be_direct and allows_direct(self._headers.path),
                num_moves=self._options.num_threads,
            )
            held.callback(segments.close)
            self._segments = segments
            self._restore()
            held.pop_all()
        self._threads = ThreadPoolExecutor(self._options.num_threads, "kvkeep-disk")

    @property
    def is_direct(self) -> bool:
        """Whether values go around the page cache; False where the file system refuses."""
        return self._segments.is_direct

    def _prepare(self, folder: Path, wanted: Geometry) -> Geometry:
        """Keep how the folder is cut if the values fit; else begin anew, with a line in the log."""
        found = self._headers.find_geometry()
        is_kept = (
            found is not None
            and found.slot_bytes == wanted.slot_bytes
            and self._num_slots <= SEGMENTS_MAX * found.slots_per_segment
        )
        if not is_kept and not self._headers.is_empty():
            log.warning(
                "what %s held is dropped: it is of another version, or cut for other sizes",
                folder,
            )
        if not is_kept:
            self._headers.reset()
            remove_all(folder)
        geometry = found if found is not None and is_kept else wanted
        self._headers.prepare(geometry, self._num_slots)
        return geometry

    def _restore(self) -> None:
        """Rebuild the index from the headers; values are looked at when they are read."""
        entries: list[tuple[int, int, BlockKey]] = []
        for slot, entry in self._headers.scan():
            if entry is None or not self._segments.has_kept(slot):
                self._headers.clear(slot)
            else:
                entries.append((entry.sequence, slot, entry.key))
        # By age, so that the policy sees them as they came. Of two under one key, which a process
        # that ended between two lines leaves, the older is as good.
        entries.sort(key=lambda item: item[0])
        used = set()
        for _, slot, key in entries:
            if self._index.put(key, slot):
                used.add(slot)
            else:
                self._headers.clear(slot)
        self._index.add_free(slot for slot in self._segments.slots() if slot not in used)
        self._sequence = entries[-1][0] if entries else 0

    def write(self, keys: Sequence[BlockKey], values: Sequence[Parts]) -> list[bool]:
        """Write what is not there yet; declines what is too long, and everything on a full disk."""
        return self._in_parallel(lambda idx: self._write_one(keys[idx], values[idx]), len(keys))

    def _write_one(self, key: BlockKey, value: Parts) -> bool:
        num_bytes = length_of(value)
        if num_bytes > self._value_bytes_max:
            return False
        if self._index.touch(key):
            return True
        slot = self._take_slot()
        if slot is None:
            return False
        try:
            self._fill(slot, key, leading(value, num_bytes), num_bytes)
        except OSError as error:
            # A file system may want room for what was allocated, too: a copy-on-write one does.
            if error.errno in _FULL:
                return False
            raise UnavailableError(f"the disk can't be written: {error.strerror}") from error
        finally:
            self._index.unpin(slot)
        return True

    def _fill(self, slot: int, key: BlockKey, value: Parts, num_bytes: int) -> None:
        self._headers.clear(slot)
        start = self._segments.write(slot, value)
        with self._numbers_lock:
            self._sequence += 1
            sequence = self._sequence
        self._headers.write(slot, Entry(key, num_bytes, _digest(value), sequence, start))
        if not self._index.put(key, slot):
            # Another thread was first; equal keys hold equal bytes.
            self._headers.clear(slot)

    def _take_slot(self) -> int | None:
        """A slot to write to: free, of a new segment, or evicted; None if there is none."""
        slot = self._index.pin_free()
        if slot is not None:
            return slot
        with self._grow_lock:
            slot = self._index.pin_free()
            if slot is None and self._clock.now_s() >= self._grow_at_s:
                self._grow()
                slot = self._index.pin_free()
        return self._index.pin_evicted() if slot is None else slot

    def _grow(self) -> None:
        try:
            self._index.add_free(self._segments.grow())
        except OSError as error:
            # With what it has the tier works on; a write says so if the disk fails altogether.
            log.warning("the disk tier can't grow now: %s", error.strerror)
            self._grow_at_s = self._clock.now_s() + self._options.grow_retry_s

    def read(self, keys: Sequence[BlockKey], into: Sequence[Parts]) -> list[int | None]:
        """Read values, and prove each by its digest; drops those that are torn or rotten."""
        return self._in_parallel(lambda idx: self._read_one(keys[idx], into[idx]), len(keys))

    def _read_one(self, key: BlockKey, room: Parts) -> int | None:
        slot = self._index.pin(key)
        if slot is None:
            return None
        try:
            found = self._read_slot(slot, key, room)
            self._suspects.discard(slot)
        except OSError as error:
            self._suspect(slot)
            raise UnavailableError(f"the disk can't be read: {error.strerror}") from error
        else:
            return found
        finally:
            self._index.unpin(slot)

    def _read_slot(self, slot: int, key: BlockKey, room: Parts) -> int | None:
        entry = self._headers.read(slot)
        if entry is None or entry.key != key or not self._has_room(entry):
            self._drop(slot)
            return None
        if entry.value_bytes > length_of(room):
            return None
        fitting = leading(room, entry.value_bytes)
        if not self._segments.read(slot, entry.start, fitting) or _digest(fitting) != entry.digest:
            self._drop(slot)
            return None
        return entry.value_bytes

    def _has_room(self, entry: Entry) -> bool:
        return entry.start + entry.value_bytes <= self._geometry.slot_bytes

    def _drop(self, slot: int) -> None:
        """Forget what a pinned slot holds: it is no good."""
        if self._index.drop(slot):
            with self._numbers_lock:
                self.num_rotten += 1
                num_rotten = self.num_rotten
            # A segment that was lost would fill the log with one line a value.
            if num_rotten.bit_count() == 1:
                log.warning("a value on the disk was torn or rotten, number %d so far", num_rotten)
            self._clear_if_possible(slot)

    def _suspect(self, slot: int) -> None:
        """A read failed. Twice in a row it is the place, not the disk: use it no more."""
        if slot not in self._suspects:
            self._suspects.add(slot)
        elif self._index.drop(slot):
            self._index.retire(slot)
            self._clear_if_possible(slot)

    def _clear_if_possible(self, slot: int) -> None:
        try:
            self._headers.clear(slot)
        except OSError as error:
            # A later process finds the same again.
            log.warning("a header can't be cleared: %s. slot=%d", error.strerror, slot)

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Forget; after a failure they are gone from this process, but may be back after it."""
        failed: OSError | None = None
        for key in keys:
            slot = self._index.pin_deleted(key)
            if slot is None:
                continue
            try:
                self._headers.clear(slot)
            except OSError as error:
                failed = error
            finally:
                self._index.unpin(slot)
        if failed is not None:
            raise UnavailableError(f"the disk can't be written: {failed.strerror}") from failed

    def lookup(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Look into the index, without counting it as a use; what is torn is still there."""
        return [key in self._index for key in keys]

    def keys(self) -> Iterator[BlockKey]:
        """All keys of one moment."""
        return iter(self._index.keys())

    def use(self) -> TierUse:
        """Whole slots, for that is what a value takes."""
        slot_bytes, num_values = self._geometry.slot_bytes, len(self._index)
        return TierUse(num_values, num_values * slot_bytes, self._num_slots * slot_bytes)

    def close(self) -> None:
        """Let the folder go; its values stay."""
        self._threads.shutdown(wait=True)
        self._segments.close()
        self._headers.close()

    def _in_parallel(self, work: Callable[[int], _Answer], num_values: int) -> list[_Answer]:
        """Do the work of each value; the first failure leaves out what has not begun.

        When it returns or raises, nobody touches the caller's memory any more.
        """
        if num_values <= 1:
            return [work(idx) for idx in range(num_values)]
        jobs: list[Future[_Answer]] = [self._threads.submit(work, idx) for idx in range(num_values)]
        _, begun = wait(jobs, return_when=FIRST_EXCEPTION)
        for job in begun:
            job.cancel()
        wait(jobs)
        for job in jobs:
            if not job.cancelled() and (error := job.exception()) is not None:
                raise error
        return [job.result() for job in jobs]


def _digest(value: Parts) -> bytes:
    digest = xxhash.xxh3_128()
    for part in value:
        digest.update(part)
    return digest.digest()


def _open_headers(folder: Path) -> HeaderFile:
    with _usable(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return HeaderFile(folder)


@contextlib.contextmanager
def _usable(folder: Path) -> Iterator[None]:
    """Say in one sentence why a folder can't be used.

    Raises:
        InputError: The system refused something.
    """
    try:
        yield
    except BlockingIOError as error:
        raise InputError(
            f"another process uses the disk tier's folder {folder}: "
            "stop it, or give this one another folder"
        ) from error
    except OSError as error:
        raise InputError(
            f"the disk tier's folder {folder} can't be used ({error.strerror}): choose another"
        ) from error
