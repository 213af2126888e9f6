"""Files that kvkeep wrote, with anything in them: a pool, a disk tier's folder, notes on weights.

A check that finds accidents can be made anew by whoever writes the file, so it is, here.
"""

import asyncio
import contextlib
import json
import mmap
import os
import struct
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.connector import weights
from kvkeep.core import effects as do
from kvkeep.core import events as on
from kvkeep.daemon.shell import Shell
from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.model.ids import BlockHash, BlockKey, Holder, Namespace
from kvkeep.model.layout import KvLayout
from kvkeep.stack.record import RECORD_NAME, read_record
from kvkeep.testing.tier_contract import block_key, in_parts
from kvkeep.tiers import shared_memory
from kvkeep.tiers.disk.entries import ENTRY_BYTES, PAGE_BYTES
from kvkeep.tiers.disk.headers import NAME
from kvkeep.tiers.disk.tier import DiskOptions, DiskTier
from kvkeep.tiers.pool_inode import FILE_HEADER_BYTES, FILE_MAGIC
from kvkeep.tiers.shared_memory import PoolFile, PoolView
from kvkeep.tiers.slot_header import (
    CHECK_BYTES,
    HEADER_BYTES,
    SlotHeader,
    SlotState,
    pack_header,
)
from tests.property.fuzz.damage import NUMBERS, costing_at_most, damaged, examples

LAYOUT = KvLayout(2, 2, 512, 16, "bfloat16", "test")
POOL_BYTES = 3 << 20
FIELDS = shared_memory._FILE_FIELDS
WRITERS_OFFSET = shared_memory._WRITERS_OFFSET
JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def pool_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a pool with blocks that are ready, being written and gone."""
    path = tmp_path_factory.mktemp("pool") / "pool"
    pool = PoolFile.open(path, POOL_BYTES)
    pool.format(LAYOUT)
    pool.note_writers([os.getpid(), 7])
    for number in range(4):
        key = BlockKey(Namespace(b"n" * 32), BlockHash(bytes([number]) * 32))
        pool.mark(number, SlotState.READY, key)
    pool.mark(4, SlotState.WRITING, block_key(5), lease_id=3, pid=os.getpid())
    pool.mark(1, SlotState.FREE, None)
    pool.close()
    return path.read_bytes()


def with_check(page: bytes) -> bytes:
    """A first page whose check is right, whatever it says."""
    length = FIELDS.unpack_from(page)[3]
    end = FIELDS.size + length
    if end + 8 > WRITERS_OFFSET:
        return page
    return page[:end] + struct.pack("<Q", xxhash.xxh3_64_intdigest(page[:end])) + page[end + 8 :]


def use_pool(data: bytes) -> None:
    """Do with a file what a worker and then a daemon do with it."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "pool"
        path.write_bytes(data)
        with contextlib.suppress(UnavailableError):
            PoolView.open(str(path), data[16:32])
        try:
            pool = PoolFile.open(path, POOL_BYTES)
        except InputError as error:
            assert "is not a pool" in str(error)  # noqa: PT017 - others are as right
            return
        asyncio.run(use_shell(pool))


async def use_shell(pool: PoolFile) -> None:
    """Recover, store and lend a block, and end."""
    shell = Shell(pool, SystemClock())
    shell.recover(set)
    shell.open_layout(LAYOUT if pool.geometry is None else pool.geometry.layout)
    assert shell.node is not None
    holder = Holder(1, os.getpid())
    heads = shell.node.ledger.all_heads
    key = block_key(99)
    asked = on.StoreAsked(0, holder, key.namespace, 0, [key.block_hash], heads, 1e12)
    reply = shell.handle(asked)
    assert isinstance(reply, do.ReplyStore)
    if reply.lease_id:
        shell.handle(on.StoreFinished(0, holder, reply.lease_id, [True]))
    shell.node.check()
    await asyncio.sleep(0)
    shell.close()


@given(data=st.data())
@examples(40)
def test_a_damaged_first_page_begins_anew(pool_file: bytes, data: st.DataObject) -> None:
    """With a wrong check and with a right one: a pool that works, or a file that is none."""
    page = data.draw(damaged(pool_file[:FILE_HEADER_BYTES])).ljust(FILE_HEADER_BYTES, b"\0")
    page = page[:FILE_HEADER_BYTES]
    if data.draw(st.booleans()):
        page = with_check(page)
    use_pool(page + pool_file[FILE_HEADER_BYTES:])


def page_of(text: bytes, generation: int = 1) -> bytes:
    """A first page with this description of the pool, and a right check."""
    fields = FIELDS.pack(FILE_MAGIC, b"i" * 16, generation, len(text))
    return with_check((fields + text).ljust(FILE_HEADER_BYTES, b"\0"))


GOOD_TEXT = {
    "layout": {"num_layers": 2, "num_heads": 2, "page_bytes": 512, "block_tokens": 16,
               "dtype": "bfloat16", "page_format": "test"},
    "num_slots": 100, "header_stride": 192, "payload_offset": 1 << 21,
}  # fmt: skip
HOSTILE_TEXTS = {
    "deep": b"[" * 1900,
    "deep in a field": b'{"layout":' + b"[" * 1800,
    "infinite": json.dumps(GOOD_TEXT | {"num_slots": float("inf")}).encode(),
    "negative": json.dumps(GOOD_TEXT | {"num_slots": -1}).encode(),
    "many slots": json.dumps(GOOD_TEXT | {"num_slots": 1 << 60}).encode(),
    "no stride": json.dumps(GOOD_TEXT | {"header_stride": 0}).encode(),
    "payload over headers": json.dumps(GOOD_TEXT | {"payload_offset": 0}).encode(),
    "half a layer": json.dumps(
        GOOD_TEXT | {"layout": {**GOOD_TEXT["layout"], "num_layers": 1.5}}  # type: ignore[dict-item]
    ).encode(),
    "endless layers": json.dumps(
        GOOD_TEXT | {"layout": {**GOOD_TEXT["layout"], "num_layers": 1 << 62}}  # type: ignore[dict-item]
    ).encode(),
    "no layout": b"{}",
    "nothing": b"null",
    "not text": b"\xff\xfe",
}


@pytest.mark.parametrize("name", HOSTILE_TEXTS)
def test_a_hostile_description_begins_anew(name: str, pool_file: bytes) -> None:
    """What it claims costs no memory and breaks nothing."""
    data = page_of(HOSTILE_TEXTS[name]) + pool_file[FILE_HEADER_BYTES:]
    with costing_at_most(32 << 20):
        use_pool(data)


@given(JSON_VALUES, NUMBERS)
@examples(40)
def test_any_description_begins_anew(pool_file: bytes, value: Any, generation: int) -> None:
    """Whatever the text says under a right check."""
    text = json.dumps(value).encode()[:1900]
    use_pool(page_of(text, generation) + pool_file[FILE_HEADER_BYTES:])


@given(data=st.data())
@examples(40)
def test_damaged_slots_are_gone_and_the_pool_works(pool_file: bytes, data: st.DataObject) -> None:
    """Headers with hostile fields under right checks, in any slots, and a hostile writers' list."""
    found = bytearray(pool_file)
    stride = 192
    for _ in range(data.draw(st.integers(1, 6))):
        start = FILE_HEADER_BYTES + stride * data.draw(st.integers(0, 8))
        source = FILE_HEADER_BYTES + stride * data.draw(st.integers(0, 4))
        fields = data.draw(damaged(bytes(found[source + CHECK_BYTES : source + HEADER_BYTES])))
        fields = fields.ljust(HEADER_BYTES - CHECK_BYTES, b"\0")[: HEADER_BYTES - CHECK_BYTES]
        is_ready = fields[6] == SlotState.READY
        digests = bytes(found[start + HEADER_BYTES : start + stride]) if is_ready else b""
        check = struct.pack("<Q", xxhash.xxh3_64_intdigest(fields + digests))
        found[start : start + HEADER_BYTES] = check + fields
    if data.draw(st.booleans()):
        pids = data.draw(st.lists(NUMBERS.map(lambda number: number & 0xFFFFFFFF), max_size=9))
        listed = struct.pack(f"<{len(pids) + 1}I", len(pids), *pids)
        listed += struct.pack("<Q", xxhash.xxh3_64_intdigest(listed))
        found[WRITERS_OFFSET : WRITERS_OFFSET + len(listed)] = listed
    use_pool(bytes(found))


@pytest.mark.parametrize(
    "header",
    [
        SlotHeader(SlotState.WRITING, 1, 1, 2048, block_key(1), (1 << 32) - 1, 9),
        SlotHeader(SlotState.WRITING, 1, 1, 2048, block_key(1), 1 << 31, 9),
        SlotHeader(SlotState.FREE, 1, 1, 2048, None, 0, (1 << 64) - 1),
        SlotHeader(SlotState.WRITING, 1, 1, 2048, block_key(1), 0, (1 << 64) - 1),
    ],
)
def test_numbers_that_nothing_can_have_are_borne(pool_file: bytes, header: SlotHeader) -> None:
    """A process that can't be, and a sequence after which no number comes."""
    start = FILE_HEADER_BYTES + 192 * 6
    use_pool(pool_file[:start] + pack_header(header) + pool_file[start + HEADER_BYTES :])


# ---- the disk tier

VALUE_BYTES = 3000
NUM_VALUES = 5


@pytest.fixture(scope="module")
def disk_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a disk tier that holds values."""
    folder = tmp_path_factory.mktemp("disk")
    tier = open_disk(folder)
    keys = [block_key(number) for number in range(NUM_VALUES)]
    assert all(tier.write(keys, [in_parts(value_of(number)) for number in range(NUM_VALUES)]))
    tier.close()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def value_of(number: int) -> bytes:
    """What is stored under a key."""
    return bytes([number + 1]) * (VALUE_BYTES - number)


def open_disk(folder: Path) -> DiskTier:
    """A tier of a few slots."""
    options = DiskOptions(num_threads=1, segment_bytes=1 << 15, may_be_direct=False)
    return DiskTier(folder, 1 << 17, VALUE_BYTES, options=options)


@given(data=st.data())
@examples(40)
def test_damaged_headers_on_disk_are_misses(
    disk_files: dict[str, bytes], data: st.DataObject
) -> None:
    """Whatever they say under a right check: a value is right or absent, and writes go on."""
    headers = bytearray(disk_files[NAME])
    for _ in range(data.draw(st.integers(1, 6))):
        start = PAGE_BYTES + ENTRY_BYTES * data.draw(st.integers(0, 8))
        source = PAGE_BYTES + ENTRY_BYTES * data.draw(st.integers(0, NUM_VALUES - 1))
        fields = data.draw(damaged(bytes(headers[source + 8 : source + ENTRY_BYTES])))
        fields = fields.ljust(ENTRY_BYTES - 8, b"\0")[: ENTRY_BYTES - 8]
        check = struct.pack("<Q", xxhash.xxh3_64_intdigest(fields))
        headers[start : start + ENTRY_BYTES] = check + fields
    if data.draw(st.integers(0, 3)) == 0:
        page = data.draw(damaged(bytes(headers[:36])))[:36].ljust(36, b"\0")
        headers[:44] = page + struct.pack("<Q", xxhash.xxh3_64_intdigest(page))
    files = {**disk_files, NAME: bytes(headers)}
    victim = data.draw(st.sampled_from(sorted(files)))
    if data.draw(st.booleans()):
        files[victim] = files[victim][: data.draw(st.integers(0, len(files[victim])))]
    with TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        use_disk(folder)


def use_disk(folder: Path) -> None:
    """Open the tier, read everything, and write something."""
    tier = open_disk(folder)
    try:
        for number in range(NUM_VALUES):
            room = bytearray(VALUE_BYTES)
            (length,) = tier.read([block_key(number)], [in_parts(room)])
            assert length is None or room[:length] == value_of(number)
        assert tier.write([block_key(50)], [in_parts(value_of(0))]) == [True]
        room = bytearray(VALUE_BYTES)
        assert tier.read([block_key(50)], [in_parts(room)]) == [VALUE_BYTES]
        assert room == value_of(0)
    finally:
        tier.close()


@pytest.mark.parametrize("name", ["segment-99999999999999999999999.kvkeep", "segment-0.kvkeep"])
def test_strange_segments_are_not_trusted(
    tmp_path: Path, disk_files: dict[str, bytes], name: str
) -> None:
    """Files that are called like segments, and a folder that is."""
    for file, content in disk_files.items():
        (tmp_path / file).write_bytes(content)
    (tmp_path / name).write_bytes(b"x")

    use_disk(tmp_path)


# ---- a stack's record, and notes on weights


JSON_TEXTS = st.binary(max_size=60) | JSON_VALUES.map(lambda value: json.dumps(value).encode())
RECORDS = [b"[" * 100_000, b'{"name": "\xff"}', b'{"processes":' + b"[" * 9999]


@given(JSON_TEXTS | st.sampled_from(RECORDS))
@examples(100)
def test_a_record_of_a_stack_is_read_or_passed_by(text: bytes) -> None:
    """What no supervisor wrote is no record."""
    with TemporaryDirectory() as folder:
        (Path(folder) / RECORD_NAME).write_bytes(text)

        assert read_record(Path(folder)) is None


INDEXES = JSON_VALUES.map(lambda value: json.dumps({"weight_map": value}).encode())


@given(JSON_TEXTS | INDEXES | st.just(b'{"weight_map":' + b"[" * 100_000))
@examples(100)
def test_an_index_of_weights_is_read_or_passed_by(text: bytes) -> None:
    """A file that is no index names no weights, whatever it says."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "a.safetensors").write_bytes(b"w")
        (Path(folder) / "model.safetensors.index.json").write_bytes(text)
        found = weights.weight_files(Path(folder), "safetensors")

        assert {path.name for path in found} <= {"a.safetensors"}


def test_the_windows_of_a_pool_are_where_this_file_thinks(pool_file: bytes) -> None:
    """The constants above are those of the format: else nothing was tested."""
    view = np.frombuffer(pool_file, dtype=np.uint8)

    assert bytes(view[FILE_HEADER_BYTES + 8 : FILE_HEADER_BYTES + 12]) == b"KVKS"
    assert bytes(view[FILE_HEADER_BYTES + 192 + 8 : FILE_HEADER_BYTES + 192 + 12]) == b"KVKS"
    assert mmap.PAGESIZE == FILE_HEADER_BYTES
