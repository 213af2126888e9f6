"""The media of the fault table, each with the ways in which it breaks.

What can't be broken for real is a shim, ``kvkeep.tiers.faulty`` around the medium. ``SHIMS`` says
which faults those are, and docs/failure-modes.md repeats it. No block device that fails on request
can be made here by the kernel's device mapper; a device that has lost its end can be made anywhere.
"""

import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import ClassVar

from kvkeep.daemon.movement.opening import open_medium
from kvkeep.daemon.tier_settings import AnyTierSettings, DiskTierSettings
from kvkeep.model.ids import BlockKey
from kvkeep.tiers.base import Parts, Tier
from kvkeep.tiers.disk.entries import PAGE_BYTES, find_entries, unpack_geometry
from kvkeep.tiers.disk.tier import DiskOptions, DiskTier
from kvkeep.tiers.faulty import FaultyTier, TierFault
from kvkeep.tiers.memory import MemoryTier
from kvkeep.tiers.wrappers.wrapper import Wrapper
from tests.fault.small_disks import filled, lost_end
from tests.fault.table import NUMBERS, VALUE_BYTES, Chain, Fault, keys_of, value_of
from tests.waiting import HANG_S

LOCAL_DEADLINE_S = 1.0
"""Of the queue for one call that may hang, where there is no server and so no other limit."""
LATE = (Fault.FROZEN, Fault.SLOW)
"""Faults in which calls hang there; in others a disk may take its time, on a busy machine."""
OVERHEAD_BYTES_MAX = 4096
"""What wrappers add to a value; more than they do."""
MIB = 1 << 20

SHIMS: dict[str, dict[Fault, TierFault]] = {
    "memory": {
        Fault.NO_ROOM: TierFault.DISK_FULL,
        Fault.IO_ERROR: TierFault.IO_ERROR,
        Fault.READ_ONLY: TierFault.READ_ONLY,
        Fault.KILLED: TierFault.IO_ERROR,
        Fault.FROZEN: TierFault.HANG,
        Fault.SLOW: TierFault.SLOW,
        Fault.CUT: TierFault.CUT,
    },
    "disk": {
        Fault.READ_ONLY: TierFault.READ_ONLY,
        Fault.KILLED: TierFault.IO_ERROR,
        Fault.FROZEN: TierFault.HANG,
        Fault.SLOW: TierFault.SLOW,
        Fault.CUT: TierFault.CUT,
    },
    "mooncake": {Fault.READ_ONLY: TierFault.READ_ONLY},
}
"""What is struck by a shim, by tier; everything else is real."""


class Kept(Wrapper):
    """A tier that several chains use, one after the other."""

    def write(self, keys: Sequence[BlockKey], values: Sequence[Parts]) -> list[bool]:
        """As the inner tier."""
        return self._inner.write(keys, values)

    def read(self, keys: Sequence[BlockKey], into: Sequence[Parts]) -> list[int | None]:
        """As the inner tier."""
        return self._inner.read(keys, into)

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """As the inner tier."""
        self._inner.delete(keys)

    def close(self) -> None:
        """Leave it open."""


class Place:
    """A medium that a test breaks and mends."""

    kind: ClassVar[str]
    evicts: ClassVar[bool] = False
    """Whether it makes room by forgetting what it has."""
    num_others: ClassVar[int] = 4
    """What a cell writes at once while the medium is broken; more than a full one takes."""
    reasons: ClassVar[dict[Fault, str]] = {
        Fault.BIT_FLIP: "wrong_digest",
        Fault.TRUNCATION: "wrong_length",
        Fault.SWAPPED: "wrong_key",
        Fault.WRONG_TENANT: "wrong_key",
    }
    """As what a damaged value is counted."""

    def __init__(self, settings: AnyTierSettings, fault: Fault) -> None:
        self.settings = settings
        self._fault = fault
        self._shim = SHIMS.get(self.kind, {}).get(fault)
        self._faulty: FaultyTier | None = None

    def medium(self, settings: AnyTierSettings, value_bytes_max: int) -> Tier:
        """Open the bare tier, with a shim before it for what can't be broken for real."""
        tier = self.bare(settings, value_bytes_max)
        if self._shim is None:
            return tier
        self._faulty = FaultyTier(tier, {}, 7)
        return self._faulty

    def bare(self, settings: AnyTierSettings, value_bytes_max: int) -> Tier:
        """As a daemon opens it."""
        return open_medium(settings, value_bytes_max)

    @contextlib.asynccontextmanager
    async def broken(self, chain: Chain) -> AsyncIterator[None]:
        """Have the medium broken, and mended in the end."""
        if self._faulty is None or self._shim is None:
            async with self.really_broken(chain):
                yield
            return
        self._faulty.chances = {self._shim: 1.0}
        try:
            yield
            assert self._faulty.num_struck[self._shim]
        finally:
            self._faulty.release()
            self._faulty.chances = {}
            self.end_of_outage()

    def end_of_outage(self) -> None:
        """What a shim can't do."""

    @contextlib.asynccontextmanager
    async def really_broken(self, chain: Chain) -> AsyncIterator[None]:
        """The same without a shim."""
        raise NotImplementedError(f"{self.kind} has no {self._fault.value}")
        yield

    # ---- single values, behind everybody's back

    def damage(self) -> list[int]:
        """Have the fault of this cell; returns the numbers of the values that it hits."""
        one, two = keys_of(NUMBERS[2:4])
        match self._fault:
            case Fault.BIT_FLIP:
                data = bytearray(self.peek(one))
                data[len(data) // 2] ^= 4
                self.poke(one, bytes(data))
                return [NUMBERS[2]]
            case Fault.TRUNCATION:
                number = self.victim()
                self.cut_short(*keys_of([number]))
                return [number]
            case Fault.SWAPPED:
                first, second = self.peek(one), self.peek(two)
                self.poke(one, second)
                self.poke(two, first)
                return [NUMBERS[2], NUMBERS[3]]
            case _:
                (theirs,) = keys_of([NUMBERS[2]], tenant=2)
                self.poke(one, self.peek(theirs))
                return [NUMBERS[2]]

    def peek(self, key: BlockKey) -> bytes:
        """What lies in the medium under a key, envelope and all."""
        room = bytearray(VALUE_BYTES + OVERHEAD_BYTES_MAX)
        with self.back_door() as tier:
            (length,) = tier.read([key], [[memoryview(room)]])
        assert length is not None
        return bytes(room[:length])

    def poke(self, key: BlockKey, data: bytes) -> None:
        """Put something else there."""
        with self.back_door() as tier:
            tier.delete([key])
            assert tier.write([key], [[memoryview(data)]]) == [True]

    def cut_short(self, key: BlockKey) -> None:
        """Lose the second half of what lies there."""
        data = self.peek(key)
        self.poke(key, data[: len(data) // 2])

    def victim(self) -> int:
        """A number whose value can be cut without its neighbors."""
        return NUMBERS[3]

    def back_door(self) -> contextlib.AbstractContextManager[Tier]:
        """A second client of the same medium, with nothing before it."""
        return contextlib.closing(self.bare(self.settings, VALUE_BYTES + OVERHEAD_BYTES_MAX))


class MemoryPlace(Place):
    """Memory of this process, with the settings of a disk: a daemon has no such tier of its own."""

    kind = "memory"

    def __init__(self, fault: Fault) -> None:
        super().__init__(_local_settings("unused", fault), fault)
        self._memory = MemoryTier(64 * MIB)

    def bare(self, settings: AnyTierSettings, value_bytes_max: int) -> Tier:
        """The same for every client."""
        return Kept(self._memory)

    def end_of_outage(self) -> None:
        """Memory ends with the process that has it."""
        if self._fault is Fault.KILLED:
            self._memory.close()


class DiskPlace(Place):
    """A folder of a disk; its files are what a back door opens."""

    kind = "disk"
    evicts = True
    num_others = 15
    reasons = dict.fromkeys(Place.reasons, "wrong_on_disk")

    def __init__(self, disk: Path, fault: Fault) -> None:
        self._disk, self._folder = disk, disk / "tier"
        super().__init__(_local_settings(str(self._folder), fault), fault)

    def bare(self, settings: AnyTierSettings, value_bytes_max: int) -> Tier:
        """In small segments, so that a small disk has room for one and not for all."""
        options = DiskOptions(segment_bytes=MIB, grow_retry_s=0.1)
        return DiskTier(self._folder, 64 * MIB, value_bytes_max, options=options)

    @contextlib.asynccontextmanager
    async def really_broken(self, chain: Chain) -> AsyncIterator[None]:
        """A file system without room, or a device that has lost its end."""
        if self._fault is Fault.NO_ROOM:
            with filled(self._disk):
                yield
        else:
            with lost_end(self._disk, value_of(NUMBERS[0])[PAGE_BYTES : 2 * PAGE_BYTES]):
                yield

    def _where(self, key: BlockKey) -> tuple[Path, int, int]:
        """The file of a value, where it begins there, and its length."""
        table = (self._folder / "headers.kvkeep").read_bytes()
        geometry = unpack_geometry(table[:PAGE_BYTES])
        assert geometry is not None
        for slot, entry in find_entries(0, table[PAGE_BYTES:]):
            if entry is not None and entry.key == key:
                idx, place = divmod(slot, geometry.slots_per_segment)
                start = place * geometry.slot_bytes + entry.start
                return self._folder / f"segment-{idx:04}.kvkeep", start, entry.value_bytes
        raise AssertionError("it is not on the disk")

    def peek(self, key: BlockKey) -> bytes:
        """From the file."""
        path, start, length = self._where(key)
        return path.read_bytes()[start : start + length]

    def poke(self, key: BlockKey, data: bytes) -> None:
        """Into the file; what stands in the header of the slot stays."""
        path, start, _ = self._where(key)
        with path.open("r+b") as file:
            file.seek(start)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def cut_short(self, key: BlockKey) -> None:
        """Have the file end in the middle of the value."""
        path, start, length = self._where(key)
        os.truncate(path, start + length // 2)

    def victim(self) -> int:
        """The last value of the last file."""
        return max(NUMBERS, key=lambda number: self._where(*keys_of([number]))[:2])


def _local_settings(folder: str, fault: Fault) -> DiskTierSettings:
    deadline_s = LOCAL_DEADLINE_S if fault in LATE else HANG_S
    return DiskTierSettings(folder=folder, capacity_bytes=64 * MIB, deadline_s=deadline_s)
