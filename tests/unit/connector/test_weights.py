"""Weights named by their bytes, and the memory of their digests."""

import os
from pathlib import Path

import platformdirs
import pytest

from kvkeep.connector.weights import digest_folder, find_weights, has_weights
from tests.unit.connector.configs import make_weights


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(folder))
    return folder


def rewrite(file: Path, content: bytes) -> None:
    """Change a file's bytes in place, and leave its size and time of change as they are."""
    before = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_equal_bytes_have_equal_names(tmp_path: Path) -> None:
    """A copy in another folder is the same model; one flipped bit makes another."""
    one, copy = (make_weights(tmp_path / name, b"x" * 100) for name in ("one", "copy"))
    other = make_weights(tmp_path / "other", b"x" * 99 + b"y")

    assert digest_folder(one) == digest_folder(copy)
    assert digest_folder(one) != digest_folder(other)


def test_what_a_file_is_called_counts(tmp_path: Path) -> None:
    """Shards that changed places are another model, though their bytes together are the same."""
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, parts in ((one, (b"a", b"b")), (other, (b"b", b"a"))):
        folder.mkdir()
        for number, part in enumerate(parts):
            (folder / f"model-{number}.safetensors").write_bytes(part)

    assert digest_folder(one) != digest_folder(other)


def test_a_digest_is_remembered(tmp_path: Path) -> None:
    """A file whose size, time and inode are as before is not read again."""
    folder = make_weights(tmp_path / "model", b"before")
    before = digest_folder(folder)
    rewrite(folder / "model.safetensors", b"after!")

    assert digest_folder(folder) == before


@pytest.mark.parametrize("change", ["time", "size", "inode"])
def test_a_changed_file_is_read_again(tmp_path: Path, change: str) -> None:
    """A new time of change, size or inode ends what was remembered."""
    folder = make_weights(tmp_path / "model", b"before")
    file = folder / "model.safetensors"
    before, stat = digest_folder(folder), file.stat()
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

    assert digest_folder(folder) != before


@pytest.mark.parametrize(
    "note", [b"", b"[]", b"{}", b'{"stamp": 1}', b"\xff\xfe", b'{"digest": 3}']
)
def test_a_rotten_note_is_written_anew(tmp_path: Path, cache: Path, note: bytes) -> None:
    """What lies in the cache folder instead of a note costs a reading, never a wrong name."""
    folder = make_weights(tmp_path / "model")
    before = digest_folder(folder)
    (found,) = (cache / "weights").iterdir()
    found.write_bytes(note)

    assert digest_folder(folder) == before
    assert b"stamp" in found.read_bytes()


def test_without_a_cache_folder_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A digest that can't be remembered is right all the same."""
    folder = make_weights(tmp_path / "model")
    before = digest_folder(folder)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path / "file" / "no"))

    assert digest_folder(folder) == before


def test_only_the_first_format_counts(tmp_path: Path) -> None:
    """VLLM loads one format; files of another beside it make no other model."""
    folder = make_weights(tmp_path / "model")
    before = digest_folder(folder)
    (folder / "pytorch_model.bin").write_bytes(b"the same, older format")

    assert digest_folder(folder) == before


def test_a_folder_without_weights_has_no_name(tmp_path: Path) -> None:
    """Neither a folder without weights nor a name that is nowhere here is found."""
    assert not has_weights(tmp_path)
    assert find_weights(str(tmp_path), None) is None
    assert find_weights("kvkeep-test/no-such-model", None) is None
    assert find_weights("not a name at all", None) is None


def test_a_local_folder_is_found(tmp_path: Path) -> None:
    """A folder with weights is its own place."""
    folder = make_weights(tmp_path / "model")

    assert find_weights(str(folder), None) == folder
