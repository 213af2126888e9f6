"""The cartridges of a host: registered, found, replaced, pinned, removed; no file left over."""

import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvkeep.cartridges.file_format import read_cartridge
from kvkeep.cartridges.manifest import Expected
from kvkeep.cartridges.registry import FILES, Registry
from kvkeep.cartridges.schema import NAME
from kvkeep.model.errors import (
    CapacityError,
    CorruptDataError,
    InputError,
    RefusedError,
    UnavailableError,
)
from tests.unit.cartridges.made import contents, draft, written

KV_BYTES = 2 * 2 * 6 * 2 * 4 * 4
"""Of `contents()`: layers, halves, tokens, heads, elements, bytes."""


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """An empty one at ten o'clock."""
    with Registry(tmp_path / "library", wall_s=lambda: 36_000.0) as made:
        yield made


def files_of(tmp_path: Path) -> list[str]:
    return sorted(os.listdir(tmp_path / "library" / FILES))


def ids(registry: Registry, **chosen: Any) -> list[str]:
    return [entry.cartridge_id for entry in registry.list_entries(**chosen)]


# ---- Registering and finding


def test_an_empty_one(registry: Registry) -> None:
    """Nothing is there, and asking for something says so."""
    assert (registry.count(), registry.list_entries(), registry.get("ships")) == (0, [], None)
    with pytest.raises(InputError, match="there is no cartridge 'ships': see kvkeep cartridge ls"):
        registry.load("ships")


def test_what_is_registered_is_found(registry: Registry, tmp_path: Path) -> None:
    """With everything that its manifest says, and a file of its own."""
    path, head = written(tmp_path)
    entry = registry.register(path)
    path.unlink()

    assert registry.get("ships") == entry
    assert (entry.manifest, entry.digest, entry.file_bytes) == (
        head.manifest, head.digest, head.file_bytes,
    )  # fmt: skip
    assert (entry.registered_s, entry.is_pinned, entry.signer, entry.has_file) == (
        36_000.0, False, "", True,
    )  # fmt: skip
    assert registry.load("ships").contents.layers == contents().layers
    assert files_of(tmp_path) == [f"{head.digest}.safetensors"]


def test_kv_in_memory_is_registered(registry: Registry) -> None:
    """Without a file of its own before."""
    entry = registry.register_contents(draft(), contents())

    assert read_cartridge(entry.path).contents.layers == contents().layers


def test_they_are_listed_by_id_model_and_label(registry: Registry) -> None:
    """Both together narrow it down."""
    for name, model, labels in (
        ("c", "tiny", {"topic": "ships", "harbor": "Leith"}),
        ("a", "tiny", {"topic": "whales"}),
        ("b", "large", {"topic": "ships"}),
    ):
        registry.register_contents(draft(name, model=model, labels=labels), contents())

    assert (ids(registry), registry.count()) == (["a", "b", "c"], 3)
    assert ids(registry, model="tiny") == ["a", "c"]
    assert ids(registry, label=("topic", "ships")) == ["b", "c"]
    assert ids(registry, label=("topic", "ships"), model="large") == ["b"]
    assert ids(registry, label=("topic", "trains")) == []
    assert ids(registry, label=("color", "ships")) == []


def test_one_of_the_same_id_is_replaced(registry: Registry, tmp_path: Path) -> None:
    """Its labels and its file with it."""
    registry.register_contents(draft(labels={"topic": "ships"}), contents())
    registry.register_contents(draft(num_training_steps=5), contents(seed=9))

    entry = registry.get("ships")
    assert entry is not None
    assert (entry.manifest.num_training_steps, registry.count()) == (5, 1)
    assert registry.list_entries(label=("topic", "ships")) == []
    assert registry.load("ships").contents.layers == contents(seed=9).layers
    assert files_of(tmp_path) == [entry.path.name]


def test_registering_twice_changes_nothing(registry: Registry, tmp_path: Path) -> None:
    """The same cartridge is the same file."""
    path, _ = written(tmp_path)

    assert registry.register(path) == registry.register(path)
    assert len(files_of(tmp_path)) == 1


def test_a_damaged_cartridge_is_not_registered(registry: Registry, tmp_path: Path) -> None:
    """What was registered under its id stays, and no file is left over."""
    before = registry.register_contents(draft(), contents())
    path, _ = written(tmp_path, kv=contents(seed=9))
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")

    with pytest.raises(CorruptDataError, match="another checksum"):
        registry.register(path)
    assert registry.get("ships") == before
    assert files_of(tmp_path) == [before.path.name]


def test_an_unsigned_one_is_not_registered_where_a_signature_is_wanted(
    registry: Registry, tmp_path: Path
) -> None:
    """Nothing was changed."""
    with pytest.raises(RefusedError, match="the signature of"):
        registry.register(written(tmp_path)[0], trusted=[bytes(32)])
    assert (registry.count(), files_of(tmp_path)) == (0, [])


def test_what_is_loaded_is_checked(registry: Registry) -> None:
    """Every time: against what is expected, and byte by byte."""
    entry = registry.register_contents(draft(), contents())
    with pytest.raises(RefusedError, match="num_heads mismatch, cartridge 2 and engine 8"):
        registry.load("ships", expected=Expected(num_heads=8))

    data = bytearray(entry.path.read_bytes())
    data[-5] ^= 1
    entry.path.write_bytes(data)
    with pytest.raises(CorruptDataError, match="another checksum"):
        registry.load("ships")


def test_a_file_that_is_gone_is_told(registry: Registry) -> None:
    """The entry is still listed, for somebody has to notice."""
    registry.register_contents(draft(), contents()).path.unlink()

    assert [entry.has_file for entry in registry.list_entries()] == [False]
    with pytest.raises(InputError, match="can't be opened"):
        registry.load("ships")


def test_what_is_no_text_is_bad_input(registry: Registry) -> None:
    """Half of a pair of characters, as a terminal may hand it over."""
    for ask in (
        lambda: registry.get("\ud800"),
        lambda: registry.list_entries(model="\ud800"),
        lambda: registry.remove("\ud800"),
    ):
        with pytest.raises(InputError, match="no text in UTF-8"):
            ask()


def test_nobody_else_may_read_the_files(registry: Registry, tmp_path: Path) -> None:
    """A document can be guessed from its KV."""
    entry = registry.register_contents(draft(), contents())

    for path in (tmp_path / "library", tmp_path / "library" / FILES, entry.path):
        assert path.stat().st_mode & 0o077 == 0


# ---- Removing and pinning


def test_what_is_removed_is_gone(registry: Registry, tmp_path: Path) -> None:
    """Row, labels and file; a second time there is nothing to remove."""
    registry.register_contents(draft(labels={"topic": "ships"}), contents())
    registry.register_contents(draft("other"), contents())

    assert (registry.remove("ships"), registry.remove("ships")) == (True, False)
    assert ids(registry) == ["other"]
    assert len(files_of(tmp_path)) == 1


def test_a_pinned_one_is_not_removed(registry: Registry) -> None:
    """Unless it is unpinned first, or its removal is forced."""
    registry.register_contents(draft("a"), contents(), pins=True)
    registry.register_contents(draft("b"), contents())
    registry.pin("b")
    registry.pin("b")

    for name in ("a", "b"):
        with pytest.raises(RefusedError, match=f"cartridge {name} is pinned: unpin it first"):
            registry.remove(name)
    registry.unpin("a")
    registry.unpin("a")

    assert registry.remove("a")
    assert registry.remove("b", force=True)
    assert registry.count() == 0


def test_what_is_not_there_can_t_be_pinned(registry: Registry) -> None:
    """Nor unpinned."""
    for act in (registry.pin, registry.unpin):
        with pytest.raises(InputError, match="there is no cartridge 'gone'"):
            act("gone")


def test_a_replaced_one_stays_pinned(registry: Registry) -> None:
    """A new version of a document's KV is wanted as much as the old one."""
    registry.register_contents(draft(), contents(), pins=True)

    assert registry.register_contents(draft(), contents(seed=9)).is_pinned


# ---- Budgets


def test_pinned_ones_stay_within_the_host_s_budget(registry: Registry, tmp_path: Path) -> None:
    """By pinning, by registering, by replacing and by lowering it; what was there stays."""
    registry.set_budget("host", 2 * KV_BYTES)
    registry.set_budget("engine", 0)
    for name in "abc":
        registry.register_contents(draft(name), contents())
    registry.pin("a")
    registry.pin("b")
    assert (registry.pinned_bytes(), registry.budget("host")) == (2 * KV_BYTES, 2 * KV_BYTES)

    larger = contents(3)
    for act in (
        lambda: registry.pin("c"),
        lambda: registry.register_contents(draft("d"), contents(), pins=True),
        lambda: registry.register_contents(draft("a"), larger),
        lambda: registry.set_budget("host", 2 * KV_BYTES - 1),
    ):
        with pytest.raises(CapacityError, match="pinned cartridges would take"):
            act()
    assert registry.pinned_bytes() == 2 * KV_BYTES
    assert (ids(registry), registry.budget("host")) == (["a", "b", "c"], 2 * KV_BYTES)
    assert registry.load("a").contents.layers == contents().layers

    registry.unpin("a")
    registry.pin("c")
    assert registry.pinned_bytes() == 2 * KV_BYTES


def test_budgets_survive_and_can_be_taken_away(tmp_path: Path) -> None:
    """They belong to the host, not to a process."""
    with Registry(tmp_path) as registry:
        registry.set_budget("engine", 5)
        registry.set_budget("engine", 7)
    with Registry(tmp_path) as registry:
        assert (registry.budget("engine"), registry.budget("host")) == (7, None)
        registry.set_budget("engine", None)
        assert registry.budget("engine") is None


@pytest.mark.parametrize("bytes_max", [-1, 1 << 63])
def test_a_budget_that_is_none_is_refused(registry: Registry, bytes_max: int) -> None:
    """The sentence says what can be."""
    with pytest.raises(InputError, match="a budget has 0 to"):
        registry.set_budget("host", bytes_max)


# ---- Files


def test_garbage_is_what_no_row_names_and_nobody_writes(registry: Registry, tmp_path: Path) -> None:
    """Left by a process that died between file and row, or while it wrote."""
    entry = registry.register_contents(draft(), contents())
    files = tmp_path / "library" / FILES
    (files / f"{'0' * 64}.safetensors").write_bytes(b"no row")
    (files / "dead.part").write_bytes(b"nobody writes it")
    (files / "notes.txt").write_bytes(b"not ours")
    with (files / "alive.part").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        assert registry.collect_garbage() == [f"{'0' * 64}.safetensors", "dead.part"]
        assert files_of(tmp_path) == sorted([entry.path.name, "alive.part", "notes.txt"])
    assert registry.collect_garbage() == ["alive.part"]


def test_two_registries_of_a_folder_see_each_other(tmp_path: Path) -> None:
    """As two processes do; neither clears away the other's files."""
    with Registry(tmp_path) as one, Registry(tmp_path) as two:
        one.register_contents(draft("a"), contents())
        two.register_contents(draft("b"), contents())

        assert ids(one) == ids(two) == ["a", "b"]
        assert one.load("b").contents.layers == two.load("a").contents.layers


def test_threads_share_one(registry: Registry) -> None:
    """Each operation is whole: nothing is lost and nothing is counted twice."""
    failures: list[Exception] = []

    def work(name: str) -> None:
        try:
            for _ in range(5):
                registry.register_contents(draft(name), contents(), pins=True)
                registry.unpin(name)
                assert registry.load(name).contents.num_tokens == 6
        except (AssertionError, OSError) as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    assert (ids(registry), registry.pinned_bytes()) == (["a", "b", "c", "d"], 0)


def test_after_close_it_says_so(tmp_path: Path) -> None:
    """Closing twice is no mistake; asking is."""
    registry = Registry(tmp_path)
    registry.close()
    registry.close()

    with pytest.raises(UnavailableError, match="closed"):
        registry.get("ships")


def test_a_registry_that_was_deleted_is_made_anew(tmp_path: Path) -> None:
    """Its files are garbage then."""
    with Registry(tmp_path) as registry:
        registry.register_contents(draft(), contents())
    for name in (NAME, f"{NAME}-wal", f"{NAME}-shm"):
        (tmp_path / name).unlink(missing_ok=True)

    with Registry(tmp_path) as registry:
        assert registry.count() == 0
        assert len(registry.collect_garbage()) == 1
