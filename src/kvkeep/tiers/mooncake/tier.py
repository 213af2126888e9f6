"""A tier in Mooncake Store: memory of many hosts behind one master, over TCP or RDMA.

The master knows where values are, storage processes hold them, and a value is readable once its
writer has told the master that it is whole. The client of the store is a child process
(docs/decisions/0012-mooncake-tier.md).
"""

import contextlib
import importlib.util
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.model.ids import BlockKey
from kvkeep.tiers.base import Parts, length_of
from kvkeep.tiers.entry_names import entry_name
from kvkeep.tiers.mooncake.lanes import NUM_LANES, ClientProcess, Lane
from kvkeep.tiers.mooncake.listening import check_library
from kvkeep.tiers.mooncake.placing import Placed, clipped, cut, place
from kvkeep.tiers.mooncake.requests import Ask, Operation
from kvkeep.tiers.mooncake.settings import REQUEST_BYTES_MAX, MooncakeSettings
from kvkeep.tiers.mooncake.shared_regions import Region, find_region
from kvkeep.tiers.mooncake.supervisor import Supervisor

NOT_READY, NOT_FOUND = -703, -704
"""A value that is still being written, and none (mooncake-store/include/types.h)."""
_AWAY: Final = range(-1099, -899)
"""Codes of the way to the master: nothing can be said about any value."""
RETRY_WITHIN_S: Final = 0.25
"""A transfer to a dead process fails after a second, and would again until the master knows."""
_UNREAD: Final = -1
"""Another attempt may read it."""

_clock = SystemClock()


class MooncakeTier:
    """Keeps values in Mooncake Store. Thread-safe.

    A request that is not answered within ``timeout_s`` raises ``UnavailableError`` after its client
    has been killed: no transfer is then left that could touch the caller's memory. A call of more
    than ``REQUEST_BYTES_MAX`` is several requests. Until a new client is ready, every call fails at
    once.
    """

    def __init__(self, settings: MooncakeSettings) -> None:
        """Begin to connect; ``wait_ready`` tells when it is done.

        Raises:
            InputError: Mooncake is not installed, or nothing would keep its client to one address.
        """
        if importlib.util.find_spec("mooncake") is None:
            raise InputError("Mooncake is not installed: pip install 'kvkeep[mooncake]'")
        check_library(settings)
        self.name = "mooncake"
        self._settings = settings
        self._lane_bytes = max(settings.value_bytes_max, REQUEST_BYTES_MAX)
        size = NUM_LANES * self._lane_bytes
        self._scratch_fd = os.memfd_create("kvkeep-mooncake")
        os.ftruncate(self._scratch_fd, size)
        self._scratch_map = mmap.mmap(self._scratch_fd, size)
        self._scratch: npt.NDArray[np.uint8] = np.frombuffer(self._scratch_map, dtype=np.uint8)
        self._regions: list[Region] = []
        self._registering = threading.Lock()
        self._supervisor = Supervisor(settings, self._scratch_fd, size)

    def wait_ready(self, timeout_s: float) -> bool:
        """Whether, after at most this long, the store can be used."""
        return self._supervisor.wait_ready(timeout_s)

    def pids(self) -> list[int]:
        """Of the processes that work for this tier now: the client's, then the segment's."""
        return self._supervisor.pids()

    def register(self, region: memoryview) -> None:
        """Share this memory with the client, if it is a writable shared mapping of a file.

        Other memory is no error: parts in it are copied once more, as without. With RDMA the memory
        is pinned.
        """
        with self._registering:
            found = find_region(region, len(self._regions) + 1)
            if found is not None:
                self._supervisor.register(found)
                self._regions.append(found)

    def write(self, keys: Sequence[BlockKey], values: Sequence[Parts]) -> list[bool]:
        """Put; a value that is there already stays and is not sent again."""
        kept = [False] * len(keys)
        for batch in cut(values, self._settings.value_bytes_max):
            names = self._names(keys, batch)
            with self._lane() as (client, lane):
                mine = [values[idx] for idx in batch]
                placed = place(mine, self._regions, self._scratch_of(lane))
                for one in placed:
                    for offset, part in one.copies:
                        end = offset + part.nbytes
                        self._scratch[offset:end] = np.frombuffer(part, dtype=np.uint8)
                pieces = [one.pieces for one in placed]
                codes = self._ask(client, lane, Ask(Operation.WRITE, names, pieces))
            for idx, code in zip(batch, codes, strict=True):
                kept[idx] = code == 0
        return kept

    def read(self, keys: Sequence[BlockKey], into: Sequence[Parts]) -> list[int | None]:
        """Get; what a dead process held is a miss, or another copy once the master knows."""
        rooms = [clipped(room, self._settings.value_bytes_max) for room in into]
        lengths: list[int | None] = [None] * len(keys)
        for batch in cut(rooms, self._settings.value_bytes_max):
            names = self._names(keys, batch)
            with self._lane() as (client, lane):
                found = self._read(client, lane, names, [rooms[idx] for idx in batch])
            for idx, length in zip(batch, found, strict=True):
                lengths[idx] = length
        return lengths

    def _read(
        self,
        client: ClientProcess,
        lane: Lane,
        names: list[str],
        rooms: list[Parts],
    ) -> list[int | None]:
        begun_s = _clock.now_s()
        lengths = self._read_once(client, lane, names, rooms)
        was_quick = _clock.now_s() - begun_s < RETRY_WITHIN_S
        again = [idx for idx, length in enumerate(lengths) if length == _UNREAD]
        if again:
            # Room of several pieces has to be exact, so the value may be shorter. Else the transfer
            # failed: at once where a connection had gone stale, slowly where a process died.
            sizes = self._ask(client, lane, Ask(Operation.SIZES, [names[idx] for idx in again]))
            fitting = [
                (idx, clipped(rooms[idx], size))
                for idx, size in zip(again, sizes, strict=True)
                if 0 < size < length_of(rooms[idx]) + was_quick
            ]
            exact = [room for _, room in fitting]
            found = self._read_once(client, lane, [names[idx] for idx, _ in fitting], exact)
            for (idx, _), length in zip(fitting, found, strict=True):
                lengths[idx] = length
        return [None if length == _UNREAD else length for length in lengths]

    def _read_once(
        self,
        client: ClientProcess,
        lane: Lane,
        names: list[str],
        rooms: list[Parts],
    ) -> list[int | None]:
        """Return the bytes of each value; None for none, ``_UNREAD`` to try again."""
        if not names:
            return []
        placed = place(rooms, self._regions, self._scratch_of(lane))
        codes = self._ask(client, lane, Ask(Operation.READ, names, [one.pieces for one in placed]))
        lengths: list[int | None] = []
        for one, code in zip(placed, codes, strict=True):
            if code >= 0:
                self._copy_out(one, code)
            is_none = code in (NOT_FOUND, NOT_READY)
            lengths.append(code if code >= 0 else None if is_none else _UNREAD)
        return lengths

    def _copy_out(self, placed: Placed, num_bytes: int) -> None:
        # Room that is scratch and memory of a caller is exact; other scratch may be longer than the
        # value.
        left = num_bytes - placed.shared_bytes
        for offset, part in placed.copies:
            size = min(part.nbytes, left)
            left -= size
            np.frombuffer(part, dtype=np.uint8)[:size] = self._scratch[offset : offset + size]

    def lookup(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Ask the master, who learns only after its ``client_ttl`` what died with a process."""
        if not keys:
            return []
        names = self._names(keys, range(len(keys)))
        with self._lane() as (client, lane):
            return [code == 1 for code in self._ask(client, lane, Ask(Operation.LOOKUP, names))]

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Remove, also what was read a moment ago."""
        if not keys:
            return
        names = self._names(keys, range(len(keys)))
        with self._lane() as (client, lane):
            codes = self._ask(client, lane, Ask(Operation.DELETE, names))
        refused = [code for code in codes if code < 0 and code not in (NOT_FOUND, NOT_READY)]
        if refused:
            raise UnavailableError(
                f"Mooncake Store did not delete {len(refused)} of {len(codes)} values "
                f"(code {refused[0]})"
            )

    def close(self) -> None:
        """End the client; the segment of this host and what was in it is given back."""
        self._supervisor.close()
        del self._scratch
        self._scratch_map.close()
        os.close(self._scratch_fd)

    def _names(self, keys: Sequence[BlockKey], batch: Sequence[int]) -> list[str]:
        return [entry_name(keys[idx], self._settings.prefix) for idx in batch]

    def _scratch_of(self, lane: Lane) -> int:
        return lane.index * self._lane_bytes

    @contextlib.contextmanager
    def _lane(self) -> Iterator[tuple[ClientProcess, Lane]]:
        client = self._supervisor.client()
        with client.lane() as lane:
            yield client, lane

    def _ask(self, client: ClientProcess, lane: Lane, ask: Ask) -> list[int]:
        try:
            codes = client.ask(lane, ask)
            _check(codes, len(ask.names))
        except UnavailableError as error:
            self._supervisor.lost(client, error)
            raise
        self._supervisor.answered()
        return codes


def _check(codes: Sequence[int], num_names: int) -> None:
    """Raise where an answer says nothing about any value."""
    away = next((code for code in codes if code in _AWAY), None)
    if away is not None:
        raise UnavailableError(
            f"Mooncake Store can't be used now: its master is away (code {away})"
        )
    if len(codes) != num_names:
        raise UnavailableError("Mooncake Store can't be used now: its answer is incomplete")
