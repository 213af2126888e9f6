"""Where clients of sequences come in."""

from pathlib import Path

import pytest

from kvkeep.daemon.sequences.listener import SequenceListener
from kvkeep.daemon.sequences.settings import SequenceSettings
from kvkeep.model.errors import InputError


def test_nobody_else_comes_in_without_a_key() -> None:
    """The refusal says what to do; no port was taken before."""
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(InputError, match="lets other machines in: name a key"):
            SequenceListener(SequenceSettings(host=host))


def test_a_key_file_must_be_private(tmp_path: Path) -> None:
    """Also on loopback."""
    file = tmp_path / "key"
    file.write_text("0123456789abcdef")
    file.chmod(0o644)

    with pytest.raises(InputError, match=r"key file of sequences .* is open to others"):
        SequenceListener(SequenceSettings(key_file=str(file)))
