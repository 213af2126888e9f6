"""Keys of tenants from master keys in files."""

import os
from pathlib import Path

import pytest

from kvkeep.model.errors import InputError
from kvkeep.model.ids import Namespace
from kvkeep.tiers.wrappers.key_ring import KEY_BYTES, KeyRing

ONE = Namespace(b"1" * 32)
TWO = Namespace(b"2" * 32)


def key_file(path: Path, content: bytes, mode: int = 0o600) -> Path:
    """A file with this content and mode."""
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("content", [b"a1" * 32, b"A1" * 32 + b"\n", b"a1" * 32 + b"\r\n"])
def test_digits_and_bytes_are_the_same_key(tmp_path: Path, content: bytes) -> None:
    """32 bytes, or their 64 hexadecimal digits with or without a line end."""
    raw = KeyRing.load([key_file(tmp_path / "raw", b"\xa1" * 32)])
    digits = KeyRing.load([key_file(tmp_path / "digits", content)])

    assert raw.find_writing(ONE) == digits.find_writing(ONE)


@pytest.mark.parametrize(
    "content",
    [b"", b"x" * 31, b"x" * 33, b"x" * 64, b"a1" * 32 + b"\n\n", b"a1" * 33, b"\xff" * 64],
)
def test_anything_else_is_refused(tmp_path: Path, content: bytes) -> None:
    """One sentence says what the file must hold."""
    path = key_file(tmp_path / "key", content)

    with pytest.raises(InputError, match="must hold 32 bytes or 64 hexadecimal digits"):
        KeyRing.load([path])


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o700])
def test_a_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    """A master key that others can read or change protects nothing."""
    path = key_file(tmp_path / "key", b"k" * 32, mode)

    with pytest.raises(InputError, match="open to others"):
        KeyRing.load([path])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """And a folder too, and a pipe without hanging."""
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(InputError, match="can't be opened"):
        KeyRing.load([tmp_path / "nothing"])
    for name in (".", "pipe"):
        with pytest.raises(InputError, match="is not a file"):
            KeyRing.load([tmp_path / name])


def test_keys_differ_by_namespace_and_master() -> None:
    """Two tenants never share a key, nor do two master keys."""
    first, second = KeyRing([b"a" * 32]), KeyRing([b"b" * 32])
    keys = [ring.find_writing(namespace) for ring in (first, second) for namespace in (ONE, TWO)]

    assert len({key.key for key in keys}) == 4
    assert len({key.key_id for key in keys}) == 2
    assert {len(key.key) for key in keys} == {KEY_BYTES}


def test_old_keys_still_read() -> None:
    """The first key writes; every key of the ring is found by its id; others are not."""
    old, both, new = KeyRing([b"a" * 32]), KeyRing([b"b" * 32, b"a" * 32]), KeyRing([b"b" * 32])
    written = old.find_writing(ONE)

    assert both.find_writing(ONE) == new.find_writing(ONE)
    assert both.find_reading(ONE, written.key_id) == written
    assert new.find_reading(ONE, written.key_id) is None


def test_a_ring_needs_keys() -> None:
    """None, too many and short ones are refused."""
    for masters in ([], [bytes([n]) * 32 for n in range(17)], [b"short"]):
        with pytest.raises(InputError):
            KeyRing(masters)


def test_keys_are_not_shown() -> None:
    """A key in a log or a traceback is a key lost."""
    assert "key=" not in repr(KeyRing([b"a" * 32]).find_writing(ONE)).replace("key_id=", "")
