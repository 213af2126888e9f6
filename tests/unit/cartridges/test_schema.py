"""The registry's database: made, migrated, and refused where it is another's or newer."""

import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvkeep.cartridges.schema import (
    APPLICATION_ID,
    NAME,
    STEPS,
    Step,
    open_database,
    told_of,
    transaction,
)
from kvkeep.model.errors import CorruptDataError, InputError, UnavailableError

LATER: Sequence[Step] = (*STEPS, ("ALTER TABLE cartridges ADD COLUMN note TEXT",))


def version_of(folder: Path, steps: Sequence[Step] = STEPS) -> int:
    connection = open_database(folder, steps)
    try:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])
    finally:
        connection.close()


def test_a_new_one_is_made(tmp_path: Path) -> None:
    """With its folder, its mark, write-ahead logging, and the newest schema."""
    folder = tmp_path / "a" / "b"
    connection = open_database(folder)
    try:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
        assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)
    finally:
        connection.close()
    assert version_of(folder) == len(STEPS)


def test_an_older_one_is_migrated_with_what_it_holds(tmp_path: Path) -> None:
    """Once; rows stay."""
    connection = open_database(tmp_path)
    connection.execute("INSERT INTO budgets VALUES ('host', 5)")
    connection.close()

    assert version_of(tmp_path, LATER) == version_of(tmp_path, LATER) == len(LATER)
    connection = open_database(tmp_path, LATER)
    try:
        assert connection.execute("SELECT * FROM budgets").fetchall() == [("host", 5)]
        assert connection.execute("SELECT note FROM cartridges").fetchall() == []
    finally:
        connection.close()


def test_a_newer_one_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    """An older kvkeep would misread it."""
    version_of(tmp_path, LATER)

    with pytest.raises(InputError, match="has version 2 and this kvkeep knows 1: use the kvkeep"):
        open_database(tmp_path)
    assert version_of(tmp_path, LATER) == len(LATER)


def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    """All of it or none."""
    version_of(tmp_path)
    broken = (*STEPS, ("CREATE TABLE half (x)", "CREATE TABLE cartridges (x)"))

    with pytest.raises(UnavailableError, match="already exists"):
        open_database(tmp_path, broken)
    connection = open_database(tmp_path)
    try:
        assert (
            connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'half'").fetchall() == []
        )
    finally:
        connection.close()


def test_another_program_s_database_is_refused(tmp_path: Path) -> None:
    """And not changed."""
    connection = sqlite3.connect(tmp_path / NAME)
    connection.execute("CREATE TABLE bookmarks (x)")
    connection.commit()
    connection.close()
    before = (tmp_path / NAME).read_bytes()

    with pytest.raises(InputError, match="is another program's database: name another folder"):
        open_database(tmp_path)
    assert (tmp_path / NAME).read_bytes() == before


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    """The sentence says what to do with it."""
    (tmp_path / NAME).write_bytes(b"no database" * 1000)

    with pytest.raises(CorruptDataError, match=r"is damaged or no database .*: move it away"):
        open_database(tmp_path)


def test_a_place_that_can_t_be_used_is_bad_input(tmp_path: Path) -> None:
    """A file where the folder should be."""
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(InputError, match=r"can't be opened .*: name another folder"):
        open_database(tmp_path / "file")


def test_a_transaction_is_done_whole_or_not_at_all(tmp_path: Path) -> None:
    """An error inside undoes it, and the connection can be used again."""
    connection = open_database(tmp_path)
    try:
        with pytest.raises(sqlite3.IntegrityError), transaction(connection):
            connection.execute("INSERT INTO budgets VALUES ('host', 5), ('engine', -1)")
        with transaction(connection):
            connection.execute("INSERT INTO budgets VALUES ('engine', 6)")

        assert connection.execute("SELECT * FROM budgets").fetchall() == [("engine", 6)]
    finally:
        connection.close()


def test_a_busy_database_is_asked_again_later(tmp_path: Path) -> None:
    """Not damaged: somebody else is writing."""
    first, second = open_database(tmp_path), open_database(tmp_path)
    try:
        second.execute("PRAGMA busy_timeout = 0")
        with (
            transaction(first),
            pytest.raises(UnavailableError, match=r"can't be used now .*locked.*: try again"),
            told_of(tmp_path / NAME),
            transaction(second),
        ):
            pass
    finally:
        first.close()
        second.close()


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    """Of a database that was refused either."""
    version_of(tmp_path, LATER)
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(InputError):
        open_database(tmp_path)

    assert sorted(os.listdir("/proc/self/fd")) == before
