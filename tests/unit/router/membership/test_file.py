"""A file of engines that changes under the router."""

import logging
import os
from pathlib import Path

import pytest

from kvkeep.model.errors import InputError
from kvkeep.router.membership.file import FileSource
from kvkeep.router.membership.member import Member


class Reader:
    """A file, its source, and what was found in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[list[str]] = []
        self.source = FileSource(path, self.take)
        self._version = 0

    def take(self, members: list[Member]) -> None:
        self.found.append([member.title for member in members])

    def write(self, text: str) -> None:
        self.path.write_text(text)
        # Two writes within one tick of the file system's clock would look like one.
        self._version += 1
        os.utime(self.path, ns=(self._version, self._version))

    def look_twice(self) -> None:
        self.source.look()
        self.source.look()


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    reader = Reader(tmp_path / "fleet.yaml")
    reader.write("engines: [{url: 'http://a:1'}]")
    reader.source.load()
    return reader


def test_a_change_is_found(reader: Reader) -> None:
    """Once."""
    reader.write("engines: [{url: 'http://b:1'}]")
    for _ in range(3):
        reader.look_twice()

    assert reader.found == [["a:1"], ["b:1"]]


def test_a_file_that_still_changes_is_left_for_the_next_look(reader: Reader) -> None:
    """It may be half written: valid, and wrong."""
    reader.write("engines: []")
    reader.source.look()
    reader.write("engines: [{url: 'http://b:1'}]")
    reader.source.look()
    assert reader.found == [["a:1"]]
    reader.source.look()

    assert reader.found == [["a:1"], ["b:1"]]


def test_a_wrong_file_changes_nothing(reader: Reader, caplog: pytest.LogCaptureFixture) -> None:
    """The last good one stays, one line says so, and the mended file counts."""
    reader.write("engines: [")
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            reader.look_twice()
    assert (reader.found, reader.source.is_good, reader.source.num_errors) == ([["a:1"]], False, 1)
    assert len(caplog.records) == 1
    reader.write("engines: [{url: 'http://b:1'}]")
    reader.look_twice()

    assert (reader.found[-1], reader.source.is_good) == (["b:1"], True)


def test_a_file_that_is_gone_changes_nothing(reader: Reader, tmp_path: Path) -> None:
    """Until it is back, though it may be the same as before."""
    reader.path.rename(tmp_path / "away")
    reader.look_twice()
    assert not reader.source.is_good
    (tmp_path / "away").rename(reader.path)
    reader.look_twice()

    assert reader.source.is_good
    assert reader.found[-1] == ["a:1"]


def test_a_wrong_file_stops_the_start(tmp_path: Path) -> None:
    """So do none, and a folder."""
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("engines: 1")
    for path in (wrong, tmp_path / "none", tmp_path):
        with pytest.raises(InputError):
            FileSource(path, lambda _members: None).load()
