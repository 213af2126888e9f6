"""The primary tier: one shared-memory file of slots, mapped by the daemon and by every engine.

    | file header, 4 KiB | slot headers and digests | padding | slot 0 | slot 1 | ...

The daemon creates the file, locks it, formats it for one layout and alone writes slot headers
(``PoolFile``). A worker maps the same file, writes payloads and digests of slots it was lent for
writing, and reads those it was lent for reading (``PoolView``). The file outlives both; after a
crash the ledger is rebuilt from the headers.

Not thread-safe by itself: what may be touched is decided by leases, not by locks.
"""

import contextlib
import fcntl
import json
import mmap
import os
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from kvkeep.model.clock import wall_clock_s
from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.model.ids import HASH_BYTES, BlockHash, BlockKey, Namespace
from kvkeep.model.layout import KvLayout
from kvkeep.tiers.pool_inode import (
    FILE_HEADER_BYTES,
    FILE_MAGIC,
    check_replaceable,
    check_room,
    lock,
    open_private,
    replace,
)
from kvkeep.tiers.slot_header import (
    BLOCK_HASH_WORDS,
    CHECK_BYTES,
    CHECK_WORD,
    DIGEST_BYTES,
    FORMAT_WORD,
    GROUP_WORD,
    HEADER_BYTES,
    NAMESPACE_WORDS,
    PAYLOAD_BYTES_WORD,
    READY_FORMAT,
    SlotHeader,
    SlotState,
    pack_header,
    unpack_header,
)

_FILE_FIELDS = struct.Struct("<16s16sQI")
"""Magic, pool id, generation, length of the JSON that follows."""
_FILE_CHECK = struct.Struct("<Q")
"""XXH3-64 of the fields and the JSON, behind them."""
_WRITERS_OFFSET = FILE_HEADER_BYTES // 2
"""Where, in the first page, the processes are listed that may be writing."""
WRITERS_MAX = (FILE_HEADER_BYTES - _WRITERS_OFFSET - _FILE_CHECK.size) // 4 - 1
GENERATION_MAX = 1 << 62
"""Far beyond any clock, and far from what a message or a header can't hold."""
SLOTS_MAX = 1 << 20
"""A terabyte of blocks of a megabyte; the ledger keeps some hundred bytes on each."""
_ALIGN = 2 << 20
"""Payloads start at a huge page."""
_MADV_POPULATE_WRITE = 23
"""Linux 5.14; Python 3.11 has no name for it."""

Digests = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where everything lies in a pool file."""

    layout: KvLayout
    num_slots: int
    header_stride: int
    """Bytes from one slot's header to the next."""
    payload_offset: int

    @staticmethod
    def fit(layout: KvLayout, pool_bytes: int) -> "Geometry":
        """As many slots as ``pool_bytes`` holds.

        Raises:
            InputError: Not even two fit, or more than ``SLOTS_MAX`` do.
        """
        stride = -(-(HEADER_BYTES + DIGEST_BYTES * layout.num_pages) // 64) * 64
        room = pool_bytes - FILE_HEADER_BYTES - _ALIGN
        num_slots = room // (layout.block_bytes + stride)
        if num_slots < 2:
            raise InputError(
                f"the pool of {pool_bytes} bytes holds no two blocks of {layout.block_bytes} "
                "bytes: raise pool_bytes"
            )
        if num_slots > SLOTS_MAX:
            raise InputError(
                f"blocks of {layout.block_bytes} bytes make {num_slots} slots of the pool of "
                f"{pool_bytes} bytes, and {SLOTS_MAX} is the limit: lower pool_bytes to "
                f"{SLOTS_MAX * (layout.block_bytes + stride)}, or have the engine use larger blocks"
            )
        end = FILE_HEADER_BYTES + num_slots * stride
        return Geometry(layout, num_slots, stride, -(-end // _ALIGN) * _ALIGN)


def _map(fd: int, num_bytes: int) -> mmap.mmap:
    """Map a pool with huge pages where the system gives them, every page present.

    Raises:
        UnavailableError: The memory is not there.
    """
    try:
        mapping = mmap.mmap(fd, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:
        raise UnavailableError(f"the pool can't be mapped: {error}") from error
    # A kernel without transparent huge pages is slower, not wrong.
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    try:
        mapping.madvise(_MADV_POPULATE_WRITE)
    except OSError as error:
        # Too old a kernel takes page faults later instead. Anything else means that the memory is
        # not there, and touching it would kill the process with SIGBUS.
        if error.errno != 22:
            mapping.close()
            raise UnavailableError(
                f"shared memory for {num_bytes} bytes is not there: lower pool_bytes or free some"
            ) from error
    return mapping


class PoolView:
    """A mapped pool: typed windows on its headers, digests and payloads.

    The mapping, and the descriptor it keeps, go with the last array that shows a part of it.
    """

    def __init__(self, mapping: mmap.mmap, geometry: Geometry, pool_id: bytes) -> None:
        self.geometry = geometry
        self.pool_id = pool_id
        self._mapping = mapping
        self.num_bytes = len(mapping)
        self._bytes = np.frombuffer(mapping, dtype=np.uint8)
        self.base_address = int(self._bytes.ctypes.data)
        shape, stride = geometry.num_slots, geometry.header_stride
        start = FILE_HEADER_BYTES
        region = self._bytes[start : start + shape * stride].reshape(shape, stride)
        self._headers = region[:, :HEADER_BYTES].view(np.uint64)
        """uint64 ``[num_slots, HEADER_BYTES / 8]``: compared eight bytes at a time."""
        layout = geometry.layout
        tables = region[:, HEADER_BYTES : HEADER_BYTES + layout.num_pages * DIGEST_BYTES]
        self.digests: Digests = np.lib.stride_tricks.as_strided(
            tables,
            shape=(shape, layout.num_layers, layout.num_heads, DIGEST_BYTES),
            strides=(stride, layout.num_heads * DIGEST_BYTES, DIGEST_BYTES, 1),
        )
        """uint8 [num_slots, num_layers, num_heads, 16]: the digest of each head page."""

    @staticmethod
    def open(path: str, pool_id: bytes) -> "PoolView":
        """Map the pool that a daemon named.

        Raises:
            UnavailableError: It is gone, is no longer that pool, or is another user's.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise UnavailableError(f"the pool {path} can't be opened: {error.strerror}") from error
        try:
            geometry = _named_geometry(fd, pool_id)
            mapping = _map(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)
        return PoolView(mapping, geometry, pool_id)

    @property
    def region(self) -> memoryview:
        """All bytes of the mapping."""
        return memoryview(self._mapping)

    def is_whole(self) -> bool:
        """False once the file was cut: touching its end would be fatal."""
        return self._mapping.size() >= self.num_bytes

    def readable(
        self,
        slots: npt.NDArray[np.int64],
        namespace: Namespace,
        group_idx: int,
        hashes: Sequence[BlockHash],
    ) -> npt.NDArray[np.bool_]:
        """Which of these slots hold exactly these blocks now, with the digests written for them.

        What a flipped bit in a header or a digest, or a header, digests or bytes of another slot
        would lead to, is found here or by the digests.

        Args:
            slots: int64 ``[num_blocks]``.
            namespace: Of all the blocks.
            group_idx: Of all the blocks.
            hashes: ``[num_blocks]``.

        Returns:
            bool ``[num_blocks]``.
        """
        found = self._headers[slots]
        wanted = np.frombuffer(b"".join(hashes), dtype=np.uint64).reshape(-1, HASH_BYTES // 8)
        is_readable: npt.NDArray[np.bool_] = (
            (found[:, BLOCK_HASH_WORDS] == wanted).all(axis=1)
            & (found[:, NAMESPACE_WORDS] == np.frombuffer(namespace, dtype=np.uint64)).all(axis=1)
            & (found[:, FORMAT_WORD] == READY_FORMAT)
            & (found[:, PAYLOAD_BYTES_WORD] == np.uint64(self.geometry.layout.block_bytes))
            & (found[:, GROUP_WORD] == np.uint64(group_idx))
        )
        return is_readable & self._checked(slots, found[:, CHECK_WORD])

    def _checked(
        self, slots: npt.NDArray[np.int64], checks: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.bool_]:
        """Which of these slots' headers and digests are as the daemon saw them at the commit."""
        length = HEADER_BYTES + DIGEST_BYTES * self.geometry.layout.num_pages - CHECK_BYTES
        starts = FILE_HEADER_BYTES + slots * self.geometry.header_stride + CHECK_BYTES
        window, digest = memoryview(self._mapping), xxhash.xxh3_64_intdigest
        found = [digest(window[start : start + length]) for start in starts.tolist()]
        checked: npt.NDArray[np.bool_] = np.array(found, dtype=np.uint64) == checks
        return checked

    def page_addresses(
        self,
        slots: npt.NDArray[np.int64],
        first_head: int,
        num_heads: int,
        layers: range | None = None,
    ) -> npt.NDArray[np.uint64]:
        """Where these slots' head pages lie: uint64 ``[num_blocks, num_layers, num_heads]``.

        ``layers``: only of these.
        """
        layout = self.geometry.layout
        heads = np.arange(first_head, first_head + num_heads, dtype=np.int64)
        wanted = np.asarray(layers or range(layout.num_layers), dtype=np.int64)
        pages = wanted[:, None] * layout.num_heads + heads
        starts = slots * layout.block_bytes + (self.base_address + self.geometry.payload_offset)
        offsets = (pages * layout.page_bytes).astype(np.uint64)
        return starts.astype(np.uint64)[:, None, None] + offsets

    def payload(self, slot: int) -> npt.NDArray[np.uint8]:
        """A slot's bytes: uint8 ``[block_bytes]``, a window, not a copy."""
        size = self.geometry.layout.block_bytes
        start = self.geometry.payload_offset + slot * size
        return self._bytes[start : start + size]


@dataclass(frozen=True, slots=True)
class _FileHeader:
    pool_id: bytes
    generation: int
    geometry: Geometry | None


def _read_file_header(fd: int) -> _FileHeader | None:
    """The first page of a pool file; None if it isn't one, is rotten, or is cut."""
    page = os.pread(fd, FILE_HEADER_BYTES, 0)
    if len(page) < FILE_HEADER_BYTES:
        return None
    magic, pool_id, generation, length = _FILE_FIELDS.unpack_from(page)
    if magic.rstrip(b"\0") != FILE_MAGIC.rstrip(b"\0"):
        return None
    end = _FILE_FIELDS.size + length
    if end + _FILE_CHECK.size > _WRITERS_OFFSET:
        return None
    if _FILE_CHECK.unpack_from(page, end)[0] != xxhash.xxh3_64_intdigest(page[:end]):
        return None
    if generation >= GENERATION_MAX:
        return None
    if not length:
        return _FileHeader(pool_id, generation, None)
    try:
        geometry = msgspec.json.decode(page[_FILE_FIELDS.size : end], type=Geometry)
        fitting = Geometry.fit(geometry.layout, os.fstat(fd).st_size)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, InputError):
        return None
    return _FileHeader(pool_id, generation, geometry) if geometry == fitting else None


def _named_geometry(fd: int, pool_id: bytes) -> Geometry:
    if os.fstat(fd).st_uid not in (0, os.getuid()):
        raise UnavailableError("the pool belongs to another user")
    found = _read_file_header(fd)
    if found is None or found.pool_id != pool_id or found.geometry is None:
        raise UnavailableError("the file is not the pool that the daemon named")
    return found.geometry


class PoolFile:
    """The daemon's hold on a pool: the lock, the format and the slot headers."""

    def __init__(self, path: Path, fd: int, mapping: mmap.mmap, found: _FileHeader | None) -> None:
        self.path = path
        self._fd = fd
        self._mapping = mapping
        self.num_bytes = len(mapping)
        self._sequence = 0
        self._payload_bytes = self._digest_bytes = 0
        # A pool made anew must not begin where its predecessor did: leases name the generation.
        self.generation = int(wall_clock_s() * 1e3) if found is None else found.generation + 1
        self.pool_id = os.urandom(16) if found is None else found.pool_id
        self.geometry: Geometry | None = None if found is None else found.geometry
        self._write_file_header()

    @staticmethod
    def open(path: Path, pool_bytes: int) -> "PoolFile":
        """Create the pool, or take over what an earlier daemon left.

        A pool that is cut, rotten, or of another size is replaced: its blocks were a cache. A file
        that never was a pool is left alone.

        Raises:
            RefusedError: Another daemon holds it; nothing was changed.
            InputError: There is not so much memory, or the path can't be had; nothing was changed.
            UnavailableError: The memory went while it was taken; the pool is gone.
        """
        fd = open_private(path)
        try:
            lock(path, fd)
            found = _read_file_header(fd)
            if found is None or os.fstat(fd).st_size != pool_bytes:
                found = None
                check_replaceable(path, fd)
                check_room(path, fd, pool_bytes)
                fd = replace(path, fd)
                os.ftruncate(fd, pool_bytes)
            try:
                mapping = _map(fd, pool_bytes)
            except UnavailableError:
                path.unlink(missing_ok=True)
                raise
        except BaseException:
            os.close(fd)
            raise
        return PoolFile(path, fd, mapping, found)

    def _write_file_header(self) -> None:
        text = b""
        if self.geometry is not None:
            self._payload_bytes = self.geometry.layout.block_bytes
            self._digest_bytes = DIGEST_BYTES * self.geometry.layout.num_pages
            text = json.dumps(asdict(self.geometry)).encode()
        page = _FILE_FIELDS.pack(FILE_MAGIC, self.pool_id, self.generation, len(text)) + text
        page += _FILE_CHECK.pack(xxhash.xxh3_64_intdigest(page))
        self._mapping[: len(page)] = page

    def format(self, layout: KvLayout) -> Geometry:
        """Cut the pool into empty slots for this layout; what it held is gone.

        Raises:
            InputError: No two blocks fit; nothing was changed.
        """
        geometry = Geometry.fit(layout, len(self._mapping))
        self.pool_id = os.urandom(16)
        self.geometry = None
        self._write_file_header()
        start, end = FILE_HEADER_BYTES, geometry.payload_offset
        np.frombuffer(self._mapping, dtype=np.uint8)[start:end] = 0
        self.geometry = geometry
        self._write_file_header()
        return geometry

    def mark(
        self, slot: int, state: SlotState, key: BlockKey | None, *, lease_id: int = 0, pid: int = 0
    ) -> None:
        """Write a slot's header; one that becomes ready has its digests by now."""
        assert self.geometry is not None
        self._sequence += 1
        header = SlotHeader(
            state, self.generation, lease_id, self._payload_bytes, key, pid, self._sequence
        )
        start = FILE_HEADER_BYTES + slot * self.geometry.header_stride
        behind = start + HEADER_BYTES
        if state is SlotState.READY:
            digests = self._mapping[behind : behind + self._digest_bytes]
            self._mapping[start:behind] = pack_header(header, digests)
        else:
            self._mapping[start:behind] = pack_header(header)

    def note_writers(self, pids: Collection[int]) -> None:
        """List the processes that may be writing, for a daemon that comes after a crash."""
        known = sorted(pids) if len(pids) <= WRITERS_MAX else [0]
        data = struct.pack(f"<{len(known) + 1}I", len(known), *known)
        data += _FILE_CHECK.pack(xxhash.xxh3_64_intdigest(data))
        self._mapping[_WRITERS_OFFSET : _WRITERS_OFFSET + len(data)] = data

    def find_writers(self) -> list[int]:
        """The processes last listed; ``[0]`` if the list is rotten or was too long."""
        (count,) = struct.unpack_from("<I", self._mapping, _WRITERS_OFFSET)
        if count > WRITERS_MAX:
            return [0]
        end = _WRITERS_OFFSET + 4 * (count + 1)
        data = self._mapping[_WRITERS_OFFSET:end]
        (check,) = _FILE_CHECK.unpack_from(self._mapping, end)
        if check != xxhash.xxh3_64_intdigest(data):
            return [0]
        return list(struct.unpack_from(f"<{count}I", data, 4))

    def scan(self) -> Iterator[tuple[int, SlotHeader | None]]:
        """Every slot that was written to, oldest header first; None for a header that is rotten."""
        if self.geometry is None:
            return
        found: list[tuple[int, SlotHeader | None]] = []
        window = memoryview(self._mapping)
        length = HEADER_BYTES + self._digest_bytes
        for slot in range(self.geometry.num_slots):
            start = FILE_HEADER_BYTES + slot * self.geometry.header_stride
            header = unpack_header(window[start : start + length])
            is_used = any(window[start : start + HEADER_BYTES]) if header is None else header.state
            if is_used:
                found.append((slot, header))
        window.release()
        found.sort(key=lambda item: -1 if item[1] is None else item[1].sequence)
        if found and found[-1][1] is not None:
            self._sequence = found[-1][1].sequence
        yield from found

    def find_harm(self) -> str | None:
        """What happened to the file that makes it no pool any more; None if nothing did.

        What lies beyond the end of a cut file can't be touched without ending the process.
        """
        found = os.fstat(self._fd)
        if found.st_size != self.num_bytes:
            return f"was cut from {self.num_bytes} to {found.st_size} bytes"
        try:
            at_path = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return "was removed"
        if (at_path.st_dev, at_path.st_ino) != (found.st_dev, found.st_ino):
            return "was replaced by another file"
        return None

    def view(self) -> PoolView:
        """Windows on the payloads, for verification in this process."""
        assert self.geometry is not None
        return PoolView(self._mapping, self.geometry, self.pool_id)

    def close(self) -> None:
        """Give the lock back; the file and its blocks stay. Closing twice does nothing."""
        if self._fd < 0:
            return
        # The mapping holds a duplicate of the descriptor, and with it the lock: unlock by name.
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        os.close(self._fd)
        self._fd = -1
        # While somebody shows parts of it, it stays until they let go.
        with contextlib.suppress(BufferError):
            self._mapping.close()

    def remove(self) -> None:
        """Delete the file; mapped engines keep their memory until they let go."""
        self.path.unlink(missing_ok=True)
