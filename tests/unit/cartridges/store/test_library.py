"""A registry's cartridges as engines ask for them: checked once, and refused by name."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import kvkeep.cartridges.store.library as library_module
from kvkeep.cartridges.manifest import Expected
from kvkeep.cartridges.registry import Registry
from kvkeep.cartridges.store.library import Checked, Library
from kvkeep.model.errors import CorruptDataError, InputError, KvkeepError, RefusedError
from tests.unit.cartridges.made import contents, draft, written

EXPECTED = Expected(model="/models/tiny", num_layers=2, num_heads=2, head_dim=4, dtype="float32",
                    block_tokens=4)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A registry with two cartridges, one of which knows its ids."""
    with Registry(tmp_path / "library") as registry:
        registry.register_contents(draft("ships"), contents(token_ids=[5, 6, 7, 8, 9, 10]))
        registry.register_contents(draft("trains", method="trained"), contents(seed=90), pins=True)
    return tmp_path / "library"


@pytest.fixture
def library(folder: Path) -> Iterator[Library]:
    """As an engine makes it."""
    made = Library(folder, lambda: EXPECTED, models=["/models/tiny", "tiny"])
    yield made
    made.close()


def find(library: Library, cartridge_id: str = "ships") -> Checked:
    """The answer."""
    return library.look_up(cartridge_id).result(timeout=30)


def test_a_cartridge_is_found(library: Library) -> None:
    """With its ids, its digest, and whether it is pinned."""
    ships, trains = find(library), find(library, "trains")

    assert ships.token_ids is not None
    assert ships.token_ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert not ships.is_pinned
    assert (trains.token_ids, trains.is_pinned) == (None, True)
    assert ships.digest != trains.digest
    assert ships.path.name == f"{ships.digest}.safetensors"


def test_a_file_is_read_once(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it is the same file; its pin is asked for anew."""
    first = find(library)
    monkeypatch.setattr(library_module, "read_cartridge", None)

    again = find(library)

    assert (again.digest, again.path) == (first.digest, first.path)


def test_many_may_ask_at_once(library: Library) -> None:
    """From any thread: each gets the same cartridge, whoever was first."""
    futures = [library.look_up(name) for name in ("ships", "trains") * 20]

    digests = [future.result(timeout=30).digest for future in futures]

    assert digests == digests[:2] * 20


def test_a_change_of_the_registry_is_seen(library: Library, folder: Path) -> None:
    """An id that names another cartridge by now gives that one."""
    first = find(library)
    with Registry(folder) as registry:
        registry.register_contents(draft("ships"), contents(seed=55))
        registry.pin("ships")

    second = find(library)

    assert first.digest != second.digest
    assert second.is_pinned


def test_a_missing_one_is_named(library: Library) -> None:
    """With the command that lists those there are."""
    with pytest.raises(InputError, match="no cartridge 'planes': see kvkeep cartridge ls"):
        find(library, "planes")


def test_a_file_that_changed_is_refused(library: Library) -> None:
    """Also after it was checked once."""
    checked = find(library)
    data = bytearray(checked.path.read_bytes())
    data[-30] ^= 1
    checked.path.write_bytes(data)

    with pytest.raises(CorruptDataError, match="checksum"):
        find(library)


def test_a_file_that_is_gone_is_named(library: Library) -> None:
    """Whatever was known of it."""
    checked = find(library)
    checked.path.unlink()

    with pytest.raises(KvkeepError, match="is gone"):
        find(library)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_layers", 3), ("num_heads", 4), ("head_dim", 8), ("dtype", "bfloat16"),
     ("block_tokens", 16), ("model", "giant")],
)  # fmt: skip
def test_what_does_not_go_with_the_engine_is_refused_by_name(
    folder: Path, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a byte of its file is read."""
    monkeypatch.setattr(library_module, "read_cartridge", None)
    wanted = {each: getattr(EXPECTED, each) for each in EXPECTED.__slots__ if each != "identity"}
    library = Library(folder, lambda: Expected(**(wanted | {name: value})), models=["elsewhere"])

    with pytest.raises(RefusedError, match=f"{name} mismatch"):
        find(library)
    library.close()


def test_other_weights_are_refused(tmp_path: Path) -> None:
    """Where both sides know them by their bytes, whatever the model is called."""
    path, _ = written(tmp_path, identity={"weights": "aa"})
    with Registry(tmp_path / "library") as registry:
        registry.register(path)
    library = Library(tmp_path / "library", lambda: Expected(identity={"weights": "bb"}))

    with pytest.raises(RefusedError, match="weights mismatch, cartridge aa and engine bb"):
        find(library)
    library.close()


def test_only_trusted_makers(folder: Path) -> None:
    """An unsigned cartridge is refused where keys are named."""
    library = Library(folder, Expected, trusted=lambda: [bytes(32)])

    with pytest.raises(RefusedError, match="signature"):
        find(library)
    library.close()
