"""The registry's database: how it is opened, its schema by version, and what its errors mean.

SQLite's ``user_version`` is the number of migrations that were applied, and ``application_id``
says that the database is a registry. Migrations are only ever added at the end.
"""

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvkeep.model.errors import CorruptDataError, InputError, UnavailableError

APPLICATION_ID = 0x6B766B63
"""``kvkc``."""
BUSY_S = 10.0
"""How long a writer waits for the others; a transaction takes milliseconds."""
NAME = "registry.sqlite"
LOCK_NAME = "registry.lock"

Step = Sequence[str]
STEPS: Sequence[Step] = (
    (
        """CREATE TABLE cartridges (
            cartridge_id TEXT PRIMARY KEY,
            model TEXT NOT NULL,
            digest TEXT NOT NULL,
            manifest BLOB NOT NULL,
            signer TEXT NOT NULL,
            file_bytes INTEGER NOT NULL,
            kv_bytes INTEGER NOT NULL,
            registered_s REAL NOT NULL,
            is_pinned INTEGER NOT NULL CHECK (is_pinned IN (0, 1))
        ) STRICT""",
        "CREATE INDEX cartridges_by_model ON cartridges (model)",
        """CREATE TABLE labels (
            cartridge_id TEXT NOT NULL REFERENCES cartridges ON DELETE CASCADE,
            name TEXT NOT NULL,
            value TEXT NOT NULL,
            PRIMARY KEY (cartridge_id, name)
        ) STRICT, WITHOUT ROWID""",
        "CREATE INDEX labels_by_value ON labels (name, value)",
        """CREATE TABLE budgets (
            place TEXT PRIMARY KEY,
            bytes_max INTEGER NOT NULL CHECK (bytes_max >= 0)
        ) STRICT, WITHOUT ROWID""",
    ),
)
"""By version, from 1: the statements that lead there from the one before."""


def open_database(folder: Path, steps: Sequence[Step] = STEPS) -> sqlite3.Connection:
    """Open a folder's registry, made or migrated where that is needed.

    Args:
        folder: Is made if it is not there.
        steps: For tests.

    Returns:
        A connection in WAL mode that begins transactions only when told to.

    Raises:
        InputError: The place can't be used, holds another program's database, or a newer one.
        CorruptDataError: It is no database, or damaged.
        UnavailableError: Others kept it busy.
    """
    path = folder / NAME
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(folder), told_of(path):
            connection = sqlite3.connect(
                path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
            )
            try:
                _prepare(connection, path, steps)
            except BaseException:
                connection.close()
                raise
    except OSError as error:
        raise InputError(
            f"the registry {path} can't be opened ({error.strerror}): name another folder"
        ) from error
    return connection


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from opening the registry, and from making or clearing away files.

    Ends with the process that holds it, however that ends.
    """
    fd = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def told_of(path: Path) -> Iterator[None]:
    """Say what SQLite's errors mean for a caller."""
    try:
        yield
    except (sqlite3.OperationalError, sqlite3.ProgrammingError) as error:
        # Busy, closed, full, read-only.
        raise UnavailableError(
            f"the registry {path} can't be used now ({error}): try again"
        ) from error
    except UnicodeEncodeError as error:
        raise InputError("that is no text in UTF-8: type it again") from error
    except sqlite3.DatabaseError as error:
        raise CorruptDataError(
            f"the registry {path} is damaged or no database ({error}): move it away and register "
            "the cartridges again"
        ) from error


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Do all of a block, or nothing of it, with no other writer between."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # SQLite itself rolls back after some errors, such as a full disk.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _prepare(connection: sqlite3.Connection, path: Path, steps: Sequence[Step]) -> None:
    version = _number(connection, "user_version")
    application = _number(connection, "application_id")
    num_tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    if num_tables and application != APPLICATION_ID:
        raise InputError(f"{path} is another program's database: name another folder")
    if version > len(steps):
        raise InputError(
            f"the registry {path} has version {version} and this kvkeep knows {len(steps)}: "
            "use the kvkeep that wrote it, or a newer one"
        )
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    if version == len(steps):
        return
    with transaction(connection):
        for statements in steps[version:]:
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(steps)}")


def _number(connection: sqlite3.Connection, pragma: str) -> int:
    return int(connection.execute(f"PRAGMA {pragma}").fetchone()[0])
