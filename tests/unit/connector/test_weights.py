"""Weights named by their bytes, and the memory of their digests."""

import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import platformdirs
import pytest

from kvkeep.connector.weights import digest_weights, find_folder, weight_files
from tests.unit.connector.configs import make_weights


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(folder))
    return folder


def digest(folder: Path, load_format: str = "auto") -> str | None:
    """What is read under a load format."""
    return digest_weights(folder, load_format)


def rewrite(file: Path, content: bytes) -> None:
    """Change a file's bytes in place, and leave its size and time of change as they are."""
    before = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_equal_bytes_have_equal_names(tmp_path: Path) -> None:
    """A copy in another folder is the same model; one flipped bit makes another."""
    one, copy = (make_weights(tmp_path / name, b"x" * 100) for name in ("one", "copy"))
    other = make_weights(tmp_path / "other", b"x" * 99 + b"y")

    assert digest(one) == digest(copy)
    assert digest(one) != digest(other)


def test_what_a_file_is_called_counts(tmp_path: Path) -> None:
    """Shards that changed places are another model, though their bytes together are the same."""
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, parts in ((one, (b"a", b"b")), (other, (b"b", b"a"))):
        folder.mkdir()
        for number, part in enumerate(parts):
            (folder / f"model-{number}.safetensors").write_bytes(part)

    assert digest(one) != digest(other)


def test_a_digest_is_remembered(tmp_path: Path, cache: Path) -> None:
    """A file that is as it was is not read again."""
    folder = make_weights(tmp_path / "model")
    before = digest(folder)
    (note,) = (cache / "weights").iterdir()
    content = json.loads(note.read_text())
    note.write_text(json.dumps(content | {"digest": "00" * 16}))

    assert digest(folder) != before


def test_a_copy_that_keeps_the_old_time_is_read(tmp_path: Path) -> None:
    """Other bytes of the same length and with the same time of modification are seen."""
    folder = make_weights(tmp_path / "model", b"before")
    before = digest(folder)
    rewrite(folder / "model.safetensors", b"after!")

    assert digest(folder) != before


@pytest.mark.parametrize("change", ["time", "size", "inode"])
def test_a_changed_file_is_read_again(tmp_path: Path, change: str) -> None:
    """A new time of change, size or inode ends what was remembered."""
    folder = make_weights(tmp_path / "model", b"before")
    file = folder / "model.safetensors"
    before, stat = digest(folder), file.stat()
    if change == "time":
        rewrite(file, b"after!")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "size":
        rewrite(file, b"afterwards")
    else:
        new = folder / "new"
        new.write_bytes(b"after!")
        os.utime(new, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        new.replace(file)

    assert digest(folder) != before


@pytest.mark.parametrize(
    "note", [b"", b"[]", b"{}", b'{"stamp": 1}', b"\xff\xfe", b'{"digest": 3}']
)
def test_a_rotten_note_is_written_anew(tmp_path: Path, cache: Path, note: bytes) -> None:
    """What lies in the cache folder instead of a note costs a reading, never a wrong name."""
    folder = make_weights(tmp_path / "model")
    before = digest(folder)
    (found,) = (cache / "weights").iterdir()
    found.write_bytes(note)

    assert digest(folder) == before
    assert b"stamp" in found.read_bytes()


def test_without_a_cache_folder_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A digest that can't be remembered is right all the same."""
    folder = make_weights(tmp_path / "model")
    before = digest(folder)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path / "file" / "no"))

    assert digest(folder) == before


def stock(folder: Path, *names: str) -> Path:
    """A folder with these files, each of its own bytes."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text(name)
    return folder


def put_index(folder: Path, *names: str, index: str = "model.safetensors.index.json") -> None:
    """Say that the weights are in these files."""
    weight_map = {f"layers.{i}": name for i, name in enumerate(names)}
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))


SHARDS = ("model-1.safetensors", "model-2.safetensors")


@pytest.mark.parametrize(
    ("load_format", "present", "read"),
    [
        ("auto", ("m.safetensors", "m.bin", "m.pt"), ("m.safetensors",)),
        ("hf", ("m.safetensors", "m.bin", "m.pt"), ("m.safetensors",)),
        ("auto", ("m.bin", "m.pt"), ("m.bin",)),
        ("auto", ("m.bin", "training_args.bin", "optimizer.bin"), ("m.bin",)),
        ("auto", ("m.pt", "m.pth", "m.gguf"), ("m.pt",)),
        ("pt", ("m.safetensors", "m.bin", "m.pt", "optimizer.pt"), ("m.pt",)),
        ("pt", ("m.safetensors",), ()),
        ("safetensors", ("m.safetensors", "m.bin"), ("m.safetensors",)),
        ("safetensors", ("m.bin",), ()),
        ("fastsafetensors", ("m.safetensors", "m.bin"), ("m.safetensors",)),
        ("instanttensor", ("m.safetensors", "m.bin"), ("m.safetensors",)),
        ("mistral", ("m.safetensors", "consolidated.safetensors"), ("consolidated.safetensors",)),
        (
            "auto",
            ("m.safetensors", "consolidated.safetensors"),
            ("consolidated.safetensors", "m.safetensors"),
        ),
        ("auto", (".hidden.safetensors", "m.bin"), ("m.bin",)),
        ("npcache", ("m.bin",), ()),
        ("sharded_state", ("m.safetensors",), ()),
        ("a plugin's", ("m.safetensors",), ()),
    ],
)
def test_the_files_of_a_load_format_are_read(
    tmp_path: Path, load_format: str, present: tuple[str, ...], read: tuple[str, ...]
) -> None:
    """What vLLM reads under a load format is digested; nothing where that is not sure."""
    folder = stock(tmp_path / "model", *present)

    assert tuple(file.name for file in weight_files(folder, load_format)) == read


@pytest.mark.parametrize("load_format", ["auto", "pt"])
def test_only_what_is_read_counts(tmp_path: Path, load_format: str) -> None:
    """Other bytes in a file that vLLM does not read make no other model; in one it reads, do."""
    folder = stock(tmp_path / "model", "model.safetensors", "model.pt")
    before = digest(folder, load_format)
    read, other = ("safetensors", "pt") if load_format == "auto" else ("pt", "safetensors")
    (folder / f"model.{other}").write_text("other weights")

    assert digest(folder, load_format) == before
    (folder / f"model.{read}").write_text("other weights")
    assert digest(folder, load_format) not in (before, None)


def test_files_that_are_not_in_the_index_are_passed_by(tmp_path: Path) -> None:
    """As vLLM does: beside the shards there may be the whole once more."""
    folder = stock(tmp_path / "model", *SHARDS, "whole.safetensors")
    put_index(folder, *SHARDS)

    assert tuple(file.name for file in weight_files(folder, "auto")) == SHARDS


def test_consolidated_files_have_an_index_of_their_own(tmp_path: Path) -> None:
    """The index of the other files says nothing about them."""
    names = ("consolidated-1.safetensors", "consolidated-2.safetensors")
    folder = stock(tmp_path / "model", *SHARDS, *names)
    put_index(folder, *SHARDS)
    put_index(folder, names[0], index="consolidated.safetensors.index.json")

    assert tuple(file.name for file in weight_files(folder, "mistral")) == names[:1]


@pytest.mark.parametrize("index", ["missing", "rotten"])
def test_an_index_that_leads_nowhere_names_nothing(tmp_path: Path, index: str) -> None:
    """Which files vLLM reads is not sure then."""
    folder = stock(tmp_path / "model", *SHARDS)
    if index == "missing":
        put_index(folder, *SHARDS, "model-3.safetensors")
    else:
        (folder / "model.safetensors.index.json").write_text("[")

    assert digest(folder) is None


def test_how_weights_are_quantized_counts(tmp_path: Path) -> None:
    """Scales and schemes kept in a file beside config.json are part of the model."""
    folder = make_weights(tmp_path / "model")
    before = digest(folder)
    (folder / "hf_quant_config.json").write_text("{}")

    assert digest(folder) != before


def test_a_folder_without_weights_has_no_name(tmp_path: Path) -> None:
    """Neither a folder without weights nor a name that is nowhere here is found."""
    assert digest(tmp_path) is None
    assert find_folder("kvkeep-test/no-such-model", None) is None
    assert find_folder("not a name at all", None) is None


def test_a_local_folder_is_found(tmp_path: Path) -> None:
    """A folder is its own place."""
    assert find_folder(str(tmp_path), None) == tmp_path


def test_the_snapshot_that_the_engine_reads_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the engine's own download folder, at its own revision."""
    asked: list[dict[str, Any]] = []

    def snapshot_download(name: str, **more: Any) -> str:
        asked.append({"name": name} | more)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    assert find_folder("some/model", "v2", "/somewhere") == tmp_path
    assert asked == [
        {
            "name": "some/model",
            "revision": "v2",
            "cache_dir": "/somewhere",
            "local_files_only": True,
        }
    ]


def test_models_of_another_hub_are_not_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ModelScope the engine reads another snapshot than the one that might be found."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "True")

    assert find_folder("some/model", None) is None
