"""Which stack a command means, and how one is shown."""

from pathlib import Path

import pytest

from kvkeep.cli.target import describe, find_folder
from kvkeep.model.errors import InputError
from kvkeep.stack.process import ProcessId
from kvkeep.stack.record import (
    DaemonRecord,
    EngineRecord,
    RouterRecord,
    StackRecord,
    clear,
    note_folder,
    noted_folder,
    write_record,
)
from kvkeep.stack.spec import default_state_dir


def test_a_file_names_its_folder(tmp_path: Path) -> None:
    """A stack file leads to the folder it names."""
    file = tmp_path / "s.yaml"
    file.write_text(f"engines: [{{name: a}}]\nstate_dir: {tmp_path}/state\n")

    assert find_folder(str(file), None) == tmp_path / "state"


def test_a_name_leads_to_the_default_folder() -> None:
    """A stack without a folder of its own is found by its name."""
    assert find_folder("s", None) == default_state_dir("s").resolve()


def test_a_name_leads_to_where_the_stack_said_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stack with a folder of its own is found by its name for as long as it has a record."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    record = StackRecord(name="s", state="ready", supervisor=ProcessId(7, 1), model="m")
    note_folder("s", folder)
    assert find_folder("s", None) == default_state_dir("s").resolve()

    write_record(folder, record)
    assert find_folder("s", None) == folder
    assert find_folder("another", None) == default_state_dir("another").resolve()

    clear(folder)
    assert noted_folder("s") is None
    assert find_folder("s", None) == default_state_dir("s").resolve()
    assert list((tmp_path / "home" / "kvkeep" / "places").iterdir()) == []


def test_without_a_place_for_notes_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stack starts all the same, and its name leads to the default folder."""
    (tmp_path / "home").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    note_folder("s", tmp_path)

    assert find_folder("s", None) == default_state_dir("s").resolve()


def test_a_folder_beats_both(tmp_path: Path) -> None:
    """A flag decides where to look."""
    assert find_folder("s", tmp_path) == tmp_path


@pytest.mark.parametrize("target", ["no/such", "none.yaml"])
def test_a_missing_file_is_one_sentence(target: str) -> None:
    """What looks like a file must be there."""
    with pytest.raises(InputError, match=f"{target} is not there: name a stack, or its file."):
        find_folder(target, None)


def test_a_machine_reads_the_addresses() -> None:
    """The JSON form holds what a script needs to go on."""
    record = StackRecord(
        name="s",
        state="ready",
        supervisor=ProcessId(7, 1),
        model="m",
        daemon=DaemonRecord(socket="/s", metrics_url="http://d", pool="/p", keep_pool=False),
        engines=[EngineRecord(name="a", url="http://a", pid=8)],
        router=RouterRecord(url="http://r", admin_url="http://r:1"),
    )

    assert describe(record, Path("/f")) == {
        "name": "s",
        "state": "ready",
        "model": "m",
        "pid": 7,
        "engines": {"a": "http://a"},
        "router": {"url": "http://r", "admin_url": "http://r:1"},
        "daemon": {"socket": "/s", "metrics_url": "http://d"},
        "logs": "/f/logs",
    }
