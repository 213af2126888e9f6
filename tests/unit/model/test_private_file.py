"""Files that hold secrets."""

from pathlib import Path

import pytest

from kvkeep.model.errors import InputError
from kvkeep.model.private_file import read_private_whole, read_secret

SECRET = "0123456789abcdef"


def _file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "key"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_secret_is_read(tmp_path: Path) -> None:
    """Without the end of its line."""
    assert read_secret(_file(tmp_path, SECRET + "\n"), "key") == SECRET.encode()


@pytest.mark.parametrize("text", ["", "short", f"{SECRET} {SECRET}", "é" * 32])
def test_what_is_no_secret_is_refused(tmp_path: Path, text: str) -> None:
    """Too short, more than one, or not ASCII; the complaint does not show it."""
    with pytest.raises(InputError, match="must hold one key") as caught:
        read_secret(_file(tmp_path, text), "key")
    assert SECRET not in str(caught.value)


def test_a_file_open_to_others_is_refused(tmp_path: Path) -> None:
    """Even to be read."""
    with pytest.raises(InputError, match="open to others"):
        read_secret(_file(tmp_path, SECRET, 0o640), "key")


def test_a_path_that_can_not_be_is_refused() -> None:
    """In one sentence, as every other."""
    with pytest.raises(InputError, match="no zero byte"):
        read_secret(Path("a\0b"), "key")


def test_a_long_file_is_refused(tmp_path: Path) -> None:
    """It is not read to its end."""
    with pytest.raises(InputError, match="more than 10 bytes"):
        read_private_whole(_file(tmp_path, "x" * 11), "key", 10)
