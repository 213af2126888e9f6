"""The pool file in one process: format, recovery, and who may open it."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvkeep.model.errors import InputError, RefusedError, UnavailableError
from kvkeep.model.ids import BlockHash, BlockKey, Namespace
from kvkeep.model.layout import KvLayout
from kvkeep.tiers.pool_inode import FILE_HEADER_BYTES
from kvkeep.tiers.shared_memory import SLOTS_MAX, Geometry, PoolFile, PoolView
from kvkeep.tiers.slot_header import SlotState

LAYOUT = KvLayout(2, 2, 512, 16, "bfloat16", "test")
POOL_BYTES = 3 << 20
NAMESPACE = Namespace(b"n" * 32)
HASHES = [BlockHash(bytes([number]) * 32) for number in range(4)]
SLOTS = np.arange(4, dtype=np.int64)


def key(number: int) -> BlockKey:
    """The key of one of the blocks."""
    return BlockKey(NAMESPACE, HASHES[number])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a pool will be."""
    return tmp_path / "pool"


@pytest.fixture
def pool(path: Path) -> Iterator[PoolFile]:
    """A formatted pool with four ready blocks in slots 0 to 3."""
    made = PoolFile.open(path, POOL_BYTES)
    made.format(LAYOUT)
    view = made.view()
    for number in range(4):
        view.digests[number] = number + 1
        view.payload(number)[:] = number
        made.mark(number, SlotState.READY, key(number))
    del view
    yield made
    made.close()


def open_view(pool: PoolFile) -> PoolView:
    """The pool as a worker maps it."""
    return PoolView.open(str(pool.path), pool.pool_id)


class TestGeometry:
    def test_slots_neither_overlap_nor_leave_the_file(self) -> None:
        """The last slot's payload ends within the pool, the last header before the payloads."""
        geometry = Geometry.fit(LAYOUT, POOL_BYTES)

        headers_end = FILE_HEADER_BYTES + geometry.num_slots * geometry.header_stride
        assert headers_end <= geometry.payload_offset
        assert geometry.payload_offset + geometry.num_slots * LAYOUT.block_bytes <= POOL_BYTES

    def test_a_pool_too_small_for_two_blocks_is_refused(self) -> None:
        """The sentence names the size of a block and the setting to raise."""
        with pytest.raises(InputError, match=r"2048 bytes: raise pool_bytes"):
            Geometry.fit(LAYOUT, 1 << 21)

    def test_tiny_blocks_do_not_make_endless_slots(self) -> None:
        """The ledger keeps some hundred bytes on each slot, so their number has a limit."""
        tiny = KvLayout(1, 1, 1, 1, "int8", "test")

        with pytest.raises(InputError, match=rf"{SLOTS_MAX} is the limit: lower pool_bytes") as e:
            Geometry.fit(tiny, 1 << 40)
        said = int(str(e.value).partition("lower pool_bytes to ")[2].partition(",")[0])
        assert SLOTS_MAX * 0.9 < Geometry.fit(tiny, said).num_slots <= SLOTS_MAX


class TestPoolView:
    def test_blocks_are_readable_under_their_own_keys_only(self, pool: PoolFile) -> None:
        """Another hash, namespace or group, and a slot in another state, are not readable."""
        view = open_view(pool)
        pool.mark(3, SlotState.WRITING, key(3))
        other = Namespace(b"m" * 32)

        found = view.readable(SLOTS, NAMESPACE, 0, HASHES)
        assert found.tolist() == [True, True, True, False]
        assert not view.readable(SLOTS, NAMESPACE, 0, HASHES[::-1])[:3].any()
        assert not view.readable(SLOTS, other, 0, HASHES).any()
        assert not view.readable(SLOTS, NAMESPACE, 1, HASHES).any()

    def test_pages_lie_where_the_layout_says(self, pool: PoolFile) -> None:
        """Addresses run layer by layer and head by head through each slot."""
        view = open_view(pool)

        pages = view.page_addresses(np.array([1]), 1, 1) - np.uint64(view.base_address)
        start = view.geometry.payload_offset + LAYOUT.block_bytes
        assert pages.tolist() == [[[start + 512], [start + 3 * 512]]]

    def test_a_cut_file_is_noticed(self, pool: PoolFile) -> None:
        """Touching a mapping beyond its file's end would end the process."""
        view = open_view(pool)
        assert view.is_whole()

        os.truncate(pool.path, POOL_BYTES // 2)
        assert not view.is_whole()
        with pytest.raises(UnavailableError):
            open_view(pool)

    def test_another_pool_is_not_mapped(self, pool: PoolFile) -> None:
        """A worker maps the pool that the daemon named or none."""
        with pytest.raises(UnavailableError, match="not the pool"):
            PoolView.open(str(pool.path), bytes(16))
        with pytest.raises(UnavailableError, match="can't be opened"):
            PoolView.open(str(pool.path) + "x", pool.pool_id)

    def test_a_view_holds_no_descriptor_of_its_own(self, pool: PoolFile) -> None:
        """Views come and go with a daemon's restarts; the mapping's descriptor goes with it."""
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(8):
            open_view(pool)

        assert len(os.listdir("/proc/self/fd")) == before

    def test_any_flipped_bit_of_the_first_page_is_found(self, pool: PoolFile) -> None:
        """A pool whose geometry may be wrong is not mapped."""
        used = len(pool.path.read_bytes()[:FILE_HEADER_BYTES].rstrip(b"\0"))
        with pool.path.open("r+b") as file:
            for bit_idx in range(0, used * 8, 7):
                file.seek(bit_idx // 8)
                byte = file.read(1)[0]
                for content in (byte ^ (1 << bit_idx % 8), byte):
                    file.seek(bit_idx // 8)
                    file.write(bytes([content]))
                    file.flush()
                    if content != byte:
                        with pytest.raises(UnavailableError):
                            open_view(pool)

        assert open_view(pool).geometry == pool.geometry


class TestPoolFile:
    def test_a_later_daemon_finds_what_an_earlier_one_left(self, pool: PoolFile) -> None:
        """Blocks, their order and the layout come back; the generation grows."""
        pool.mark(2, SlotState.FREE, None)
        pool.mark(0, SlotState.WRITING, key(0), lease_id=5, pid=77)
        generation = pool.generation
        pool.close()

        again = PoolFile.open(pool.path, POOL_BYTES)
        found = [(slot, header and header.state) for slot, header in again.scan()]
        assert found == [
            (1, SlotState.READY),
            (3, SlotState.READY),
            (0, SlotState.WRITING),
        ]
        assert again.generation == generation + 1
        assert again.pool_id == pool.pool_id
        assert again.geometry == pool.geometry
        again.close()

    def test_a_rotten_header_is_reported_as_such(self, pool: PoolFile) -> None:
        """What can't be read is named, so that it is counted and its slot cleaned."""
        assert pool.geometry is not None
        start = FILE_HEADER_BYTES + pool.geometry.header_stride
        pool._mapping[start + 50 : start + 51] = b"\xaa"

        assert dict(pool.scan())[1] is None

    def test_a_second_daemon_is_refused(self, pool: PoolFile) -> None:
        """The pool is locked by whoever opened it first; nothing changes."""
        generation = pool.generation

        with pytest.raises(RefusedError, match="another daemon holds the pool"):
            PoolFile.open(pool.path, POOL_BYTES)
        assert pool.generation == generation
        assert open_view(pool).readable(SLOTS, NAMESPACE, 0, HASHES).all()

    def test_a_format_empties_the_pool_under_a_new_name(self, pool: PoolFile) -> None:
        """Workers that still map the old pool can tell."""
        before = pool.pool_id
        pool.format(KvLayout(1, 1, 512, 16, "bfloat16", "test"))

        assert pool.pool_id != before
        assert list(pool.scan()) == []

    def test_a_file_that_is_no_pool_is_left_alone(self, path: Path) -> None:
        """A slip in a path costs nobody a file."""
        path.write_text("dear diary")

        with pytest.raises(InputError, match="exists and is not a pool"):
            PoolFile.open(path, POOL_BYTES)
        assert path.read_text() == "dear diary"

    @pytest.mark.parametrize("has_hole", [True, False])
    def test_a_file_that_begins_with_zeros_is_left_alone(self, path: Path, has_hole: bool) -> None:
        """As images of disks do."""
        with path.open("wb") as file:
            file.write(b"" if has_hole else bytes(1 << 21))
            file.seek(1 << 21)
            file.write(b"dear diary")

        with pytest.raises(InputError, match="exists and is not a pool"):
            PoolFile.open(path, POOL_BYTES)
        assert path.read_bytes().endswith(b"dear diary")

    def test_a_blank_file_becomes_a_pool(self, path: Path) -> None:
        """A daemon was killed before it wrote the header."""
        with path.open("wb") as file:
            file.truncate(POOL_BYTES)

        PoolFile.open(path, POOL_BYTES).close()

    def test_a_pool_of_another_size_is_replaced(self, pool: PoolFile) -> None:
        """A user may give the pool more memory; its blocks were a cache."""
        pool.close()

        again = PoolFile.open(pool.path, POOL_BYTES * 2)
        assert again.geometry is None
        assert again.num_bytes == POOL_BYTES * 2
        again.close()

    def test_more_than_the_machine_has_is_refused(self, path: Path) -> None:
        """Nothing is left behind, and the sentence names the limit."""
        with pytest.raises(InputError, match=r"is more than the \d+ bytes .*: lower pool_bytes"):
            PoolFile.open(path, 1 << 50)
        assert not path.exists()

    def test_a_pool_that_others_may_read_is_made_private(self, path: Path) -> None:
        """Whoever can write the pool can write what engines compute with."""
        path.touch(mode=0o666)
        PoolFile.open(path, POOL_BYTES).close()

        assert path.stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize("kind", ["folder", "link", "fifo", "below a file"])
    def test_what_is_not_a_file_is_refused(self, kind: str, path: Path) -> None:
        """A folder, a link, a pipe and an impossible path are named as what is wrong."""
        match kind:
            case "folder":
                path.mkdir()
            case "link":
                path.symlink_to(path.parent / "elsewhere")
            case "fifo":
                os.mkfifo(path)
            case _:
                path.touch()
                path = path / "pool"

        with pytest.raises(InputError, match="choose another path"):
            PoolFile.open(path, POOL_BYTES)

    @pytest.mark.root
    def test_another_users_file_is_refused(self, path: Path) -> None:
        """A file that somebody else made first, as anyone can in /dev/shm, is not used."""
        path.touch()
        os.chown(path, 65534, 65534)

        with pytest.raises(InputError, match="not a file of this user"):
            PoolFile.open(path, POOL_BYTES)


def test_another_size_takes_another_file(path: Path) -> None:
    """Engines that have the old one mapped keep every byte of it: a cut would end them."""
    first = PoolFile.open(path, POOL_BYTES)
    first.format(LAYOUT)
    first.view().payload(3)[:] = 3
    view = open_view(first)
    first.close()
    bigger = PoolFile.open(path, POOL_BYTES + (1 << 20))
    bigger.close()

    assert view.is_whole()
    assert view.payload(3)[-1] == 3
    assert path.stat().st_size == POOL_BYTES + (1 << 20)
