"""What a daemon can be told about sequences."""

from pathlib import Path

import pytest

from kvkeep.daemon.sequences.settings import SequenceSettings
from kvkeep.daemon.settings import DaemonSettings, load_settings
from kvkeep.model.errors import InputError


def load(section: object) -> DaemonSettings:
    """Settings of a daemon with this section."""
    return load_settings(None, {}, {"sequences": section})


def test_there_is_no_listener_unless_it_is_asked_for() -> None:
    """An empty section asks for one, on loopback."""
    assert DaemonSettings().sequences is None
    assert load({}).sequences == SequenceSettings()
    assert SequenceSettings().host == "127.0.0.1"


def test_sizes_are_understood() -> None:
    """As in the other sections."""
    found = load({"bytes_max": "2GiB", "body_bytes_max": "1 MiB"}).sequences

    assert found is not None
    assert (found.bytes_max, found.body_bytes_max) == (2 << 30, 1 << 20)


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ({"bytes_max": "much"}, "is not a size"),
        ({"bytes_max": 1}, "sequences"),
        ({"bytes_max": "1MiB"}, "body_bytes_max is more than"),
        ({"transfer_bytes_max": "1MiB"}, "body_bytes_max is more than"),
        ({"port": 70000}, "port"),
        ({"request_s_max": 0}, "request_s_max"),
        ({"host": ""}, "host"),
        ({"hots": "127.0.0.1"}, "hots"),
        ([], "sequences"),
        ("on", "sequences"),
    ],
)
def test_any_other_section_is_refused(section: object, complaint: str) -> None:
    """In one sentence that names it."""
    with pytest.raises(InputError, match=complaint):
        load(section)


def test_a_file_may_hold_the_section(tmp_path: Path) -> None:
    """It fits no flag."""
    file = tmp_path / "daemon.yaml"
    file.write_text("sequences: {port: 7000}\n")

    found = load_settings(file, {}, {}).sequences
    assert found is not None
    assert found.port == 7000
