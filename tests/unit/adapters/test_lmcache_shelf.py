"""Cartridges as chunks of another cache: the right bits of the right rank, or nothing."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvkeep.adapters.lmcache_shelf import Geometry, Shelf
from kvkeep.cartridges.contents import Contents
from kvkeep.cartridges.manifest import Expected
from kvkeep.cartridges.registry import Registry
from kvkeep.model.errors import InputError
from tests.unit.cartridges.made import contents, draft

CHUNK = 4
SHAPE = (10, 2, 3)
NUM_LAYERS = 2
KV_BYTES = 2 * NUM_LAYERS * SHAPE[1] * SHAPE[2] * 4
EXPECTED = Expected(model="tiny", num_layers=NUM_LAYERS, num_heads=2, head_dim=3, dtype="float32")
IDS = list(range(100, 110))


def hash_chunks(token_ids: list[int]) -> list[int]:
    """As caches do: a chunk's hash is of all tokens up to its end."""
    ends = range(CHUNK, len(token_ids) + 1, CHUNK)
    return [hash(tuple(token_ids[:end])) for end in ends]


FIRST, SECOND = hash_chunks(IDS)


def kv(seed: int = 7, **more: Any) -> Contents:
    return contents(NUM_LAYERS, seed=seed, shape=SHAPE, **{"token_ids": IDS, **more})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with Registry(tmp_path) as registry:
        registry.register_contents(draft("ships"), kv())
        registry.register_contents(draft("whales"), kv(seed=9))
    return tmp_path


@pytest.fixture
def shelf(folder: Path) -> Iterator[Shelf]:
    made = open_shelf(folder)
    yield made
    made.close()


def open_shelf(folder: Path, *, bytes_max: int = 1 << 20, **geometry: Any) -> Shelf:
    told = {"expected": EXPECTED, "chunk_tokens": CHUNK, **geometry}
    return Shelf(folder, Geometry(**told), hash_chunks, bytes_max=bytes_max)


def bits_of(seed: int, tokens: slice, heads: slice = slice(None)) -> Any:
    """What a chunk has to be."""
    layers = kv(seed).layers
    return np.array(
        [
            [layer[part].bits()[tokens, heads].reshape(CHUNK, -1) for layer in layers]
            for part in (0, 1)
        ]
    )


def test_whole_chunks_are_there(shelf: Shelf) -> None:
    """Of ten tokens two chunks of four; what is behind them is computed."""
    assert shelf.has("ships", FIRST)
    assert shelf.has("ships", SECOND)
    assert not shelf.has("ships", hash_chunks([*IDS, 1, 2])[2])


def test_their_bits_are_the_cartridge_s(shelf: Shelf) -> None:
    """Keys, then values, layer by layer, heads side by side."""
    for seed, name in ((7, "ships"), (9, "whales")):
        for idx, chunk_hash in enumerate((FIRST, SECOND)):
            chunk = shelf.read(name, chunk_hash)
            wanted = bits_of(seed, slice(idx * CHUNK, (idx + 1) * CHUNK))

            assert chunk is not None
            assert chunk.shape == (2, NUM_LAYERS, CHUNK, SHAPE[1] * SHAPE[2])
            assert np.array_equal(chunk, wanted)


def test_a_rank_has_its_heads_only(folder: Path) -> None:
    """Two ranks have one head each, and half of the bytes."""
    for rank in (0, 1):
        shelf = open_shelf(folder, rank=rank, num_ranks=2)
        chunk = shelf.read("ships", SECOND)
        shelf.close()

        assert chunk is not None
        assert np.array_equal(chunk, bits_of(7, slice(CHUNK, 2 * CHUNK), slice(rank, rank + 1)))
        assert shelf.metrics.bytes_promoted == KV_BYTES * 2 * CHUNK // 2


def test_heads_that_can_t_be_divided_are_refused(folder: Path) -> None:
    """Before anything is read."""
    with pytest.raises(InputError, match="2 heads can't be divided among 3 ranks"):
        open_shelf(folder, num_ranks=3)


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("bees", {}, "there is no cartridge 'bees'"),
        ("ships", {"model": "large"}, "model mismatch"),
        ("ships", {"dtype": "float16"}, "dtype mismatch, cartridge float32 and engine float16"),
        ("ships", {"num_heads": 4}, "num_heads mismatch"),
        ("ships", {"num_layers": 3}, "num_layers mismatch"),
    ],
)
def test_what_does_not_go_with_the_engine_is_as_good_as_absent(
    folder: Path, caplog: pytest.LogCaptureFixture, name: str, more: dict[str, Any], said: str
) -> None:
    """It is said once, by name, and the text is computed."""
    told = {"model": "tiny", "num_layers": 2, "num_heads": 2, "head_dim": 3, "dtype": "float32"}
    shelf = open_shelf(folder, expected=Expected(**{**told, **more}))
    for _ in range(3):
        assert not shelf.has(name, FIRST)
        assert shelf.read(name, FIRST) is None
        assert not shelf.pin(name, FIRST)
    shelf.close()

    assert [said in record.message for record in caplog.records] == [True]


def test_a_trained_cartridge_has_no_chunks(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No text has its tokens."""
    with Registry(folder) as registry:
        registry.register_contents(draft("trained"), kv(token_ids=None))
    shelf = open_shelf(folder)

    assert not shelf.has("trained", FIRST)
    shelf.close()
    assert "knows no token ids" in caplog.text


def test_a_damaged_file_is_never_read(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its checksum is compared before a chunk is handed out."""
    with Registry(folder) as registry:
        entry = registry.get("ships")
    assert entry is not None
    entry.path.chmod(0o600)
    payload = bytearray(entry.path.read_bytes())
    payload[-50] ^= 1
    entry.path.write_bytes(payload)
    shelf = open_shelf(folder)

    assert shelf.read("ships", FIRST) is None
    assert shelf.metrics.failed == 1
    assert shelf.has("whales", FIRST)
    shelf.close()
    assert "checksum" in caplog.text


def test_memory_is_bounded(folder: Path) -> None:
    """The one used longest ago leaves for another; what was handed out stays as it is."""
    shelf = open_shelf(folder, bytes_max=KV_BYTES * 2 * CHUNK)
    chunk = shelf.read("ships", FIRST)
    assert chunk is not None
    before = chunk.copy()
    assert shelf.has("whales", FIRST)
    assert shelf.metrics.evicted == 1
    assert shelf.has("ships", FIRST)
    shelf.close()

    assert (shelf.metrics.promoted, shelf.metrics.evicted) == (3, 2)
    assert np.array_equal(chunk, before)


def test_what_is_pinned_stays_in_memory(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Until each pin is undone, and no further."""
    shelf = open_shelf(folder, bytes_max=KV_BYTES * 2 * CHUNK)
    assert shelf.pin("ships", FIRST)
    assert shelf.pin("ships", SECOND)
    assert shelf.unpin("ships", FIRST)
    assert not shelf.has("whales", FIRST)
    assert "cannot fit" in caplog.text
    assert shelf.unpin("ships", SECOND)
    assert not shelf.unpin("ships", SECOND)
    assert not shelf.unpin("bees", FIRST)
    assert shelf.has("whales", FIRST)
    shelf.close()


def test_a_cartridge_can_be_dropped_from_memory(shelf: Shelf) -> None:
    """Not while it is pinned, unless by force; its file stays, and it comes back."""
    assert not shelf.drop("ships", force=True)
    shelf.pin("ships", FIRST)

    assert not shelf.drop("ships", force=False)
    assert shelf.drop("ships", force=True)
    assert shelf.has("ships", FIRST)


def test_a_cartridge_that_is_replaced_is_read_anew(folder: Path, shelf: Shelf) -> None:
    """Also while the old one is pinned; one that is removed is gone."""
    assert shelf.pin("ships", FIRST)
    with Registry(folder) as registry:
        registry.register_contents(draft("ships"), kv(seed=9))
        replaced = shelf.read("ships", FIRST)
        registry.remove("ships")

    assert replaced is not None
    assert np.array_equal(replaced, bits_of(9, slice(0, CHUNK)))
    assert not shelf.has("ships", FIRST)


def test_after_its_end_it_has_nothing(shelf: Shelf) -> None:
    """Twice is once."""
    assert shelf.has("ships", FIRST)
    shelf.close()
    shelf.close()

    assert not shelf.has("ships", FIRST)


def test_threads_may_ask_at_once(shelf: Shelf) -> None:
    """Each gets its cartridge's bits, and all pins are undone."""
    wrong: list[str] = []

    def work(name: str, seed: int) -> None:
        wanted = bits_of(seed, slice(0, CHUNK))
        for _ in range(20):
            shelf.pin(name, FIRST)
            chunk = shelf.read(name, FIRST)
            if chunk is None or not np.array_equal(chunk, wanted):
                wrong.append(name)
            shelf.unpin(name, FIRST)

    threads = [
        threading.Thread(target=work, args=pair) for pair in (("ships", 7), ("whales", 9)) * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []
    assert shelf.drop("ships", force=False)
    assert shelf.drop("whales", force=False)
