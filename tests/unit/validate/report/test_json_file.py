"""JSON reports: whole or not at all."""

import json
from pathlib import Path

import pytest

from kvkeep.model.errors import InputError
from kvkeep.validate.report.json_file import write_json


def test_a_report_is_written_with_its_folders(tmp_path: Path) -> None:
    """Missing folders are made, and nothing but the report is left."""
    path = tmp_path / "a" / "b.json"

    write_json({"passed": True}, path)

    assert json.loads(path.read_text()) == {"passed": True}
    assert list(path.parent.iterdir()) == [path]


def test_an_old_report_is_replaced(tmp_path: Path) -> None:
    """The newest run's report stands in the file."""
    path = tmp_path / "r.json"
    write_json({"run": 1}, path)

    write_json({"run": 2}, path)

    assert json.loads(path.read_text()) == {"run": 2}


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """A report that cannot be written is bad input, and what was there stays."""
    (tmp_path / "file").write_text("kept")

    with pytest.raises(InputError, match="another place"):
        write_json({}, tmp_path / "file" / "r.json")
    assert (tmp_path / "file").read_text() == "kept"
