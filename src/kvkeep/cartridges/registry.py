"""The cartridges of a host: which there are, where their files lie, and which are pinned.

A folder holds a database and the files. What is registered is copied there and checked on the way,
so nothing that happens to the original changes it. A file is called after its cartridge's digest,
and lies there before the database names it; one that no row names is garbage, cleared away by
whoever writes next. Several processes and threads may use one folder at once.
"""

import contextlib
import fcntl
import os
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, get_args

from kvkeep.cartridges.contents import Contents
from kvkeep.cartridges.file_format import (
    SUFFIX,
    Cartridge,
    Head,
    copy_cartridge,
    read_cartridge,
    read_head,
    told_of_writing,
    write_into,
)
from kvkeep.cartridges.manifest import Draft, Expected, Manifest, parse_manifest
from kvkeep.cartridges.schema import (
    NAME,
    STEPS,
    Step,
    locked,
    open_database,
    told_of,
    transaction,
)
from kvkeep.cartridges.signing import SigningKey
from kvkeep.model.clock import wall_clock_s
from kvkeep.model.errors import CapacityError, InputError, RefusedError

FILES = "files"
PART_SUFFIX = ".part"
Place = Literal["host", "engine"]
"""Where cartridges stay resident: in the host's memory, or in an engine's own."""
BYTES_MAX = (1 << 63) - 1
"""Of a budget: what SQLite holds."""
_COLUMNS = "cartridge_id, manifest, digest, signer, file_bytes, kv_bytes, registered_s, is_pinned"


@dataclass(frozen=True)
class Entry:
    """One registered cartridge, as it was when it was asked for."""

    manifest: Manifest
    path: Path
    """Its file in the registry's folder."""
    digest: str
    """See ``Head.digest``."""
    signer: str
    """Short name of the key that signed it; empty: none did."""
    file_bytes: int
    registered_s: float
    """Seconds since 1970."""
    is_pinned: bool

    @property
    def has_file(self) -> bool:
        """Whether its file is where it was put."""
        return self.path.is_file()

    @property
    def cartridge_id(self) -> str:
        """What requests call it."""
        return self.manifest.cartridge_id


class Registry:
    """The registry of one folder; a context manager, safe to use from several threads.

    Every method raises UnavailableError where others keep the database busy for too long, or after
    `close`, and CorruptDataError where it is damaged; nothing was changed then.
    """

    def __init__(
        self,
        folder: Path,
        *,
        steps: Sequence[Step] = STEPS,
        wall_s: Callable[[], float] = wall_clock_s,
    ) -> None:
        """Open a folder's registry; it is made if it is not there.

        Args:
            folder: Where database and files lie.
            steps: For tests.
            wall_s: For tests.

        Raises:
            InputError: The place can't be used, or holds a newer version's registry.
        """
        self._folder = folder
        self._path = folder / NAME
        self._files = folder / FILES
        self._wall_s = wall_s
        self._lock = threading.Lock()
        with told_of_writing(self._files):
            # A document can be guessed from its KV: nobody else may read it.
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._files.mkdir(mode=0o700, exist_ok=True)
        self._connection = open_database(folder, steps)

    def __enter__(self) -> "Registry":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database. May be called again."""
        with self._lock:
            self._connection.close()

    # ---- Asking

    def get(self, cartridge_id: str) -> Entry | None:
        """A cartridge by its id."""
        rows = self._entries("WHERE cartridge_id = ?", (cartridge_id,))
        return rows[0] if rows else None

    def list_entries(
        self, *, model: str | None = None, label: tuple[str, str] | None = None
    ) -> list[Entry]:
        """Every cartridge, or those of a model, or with a label of that name and value, by id."""
        wheres, values = [], []
        if model is not None:
            wheres.append("model = ?")
            values.append(model)
        if label is not None:
            wheres.append(
                "cartridge_id IN (SELECT cartridge_id FROM labels WHERE name = ? AND value = ?)"
            )
            values += label
        where = f"WHERE {' AND '.join(wheres)}" if wheres else ""
        return self._entries(where, values)

    def count(self) -> int:
        """How many cartridges there are."""
        with self._using() as connection:
            return int(connection.execute("SELECT count(*) FROM cartridges").fetchone()[0])

    def load(
        self,
        cartridge_id: str,
        *,
        expected: Expected | None = None,
        trusted: Sequence[bytes] = (),
    ) -> Cartridge:
        """Read a cartridge, every byte checked.

        Raises:
            InputError: There is none of that id, or its file is gone.
            CorruptDataError: Its file is not what was registered.
            RefusedError: It is not what is expected, or not signed by one of these keys.
        """
        entry = self.get(cartridge_id)
        if entry is None:
            raise _unknown(cartridge_id)
        return read_cartridge(entry.path, expected=expected, trusted=trusted)

    # ---- Changing

    def register(self, path: Path, *, trusted: Sequence[bytes] = (), pins: bool = False) -> Entry:
        """Take a copy of a cartridge, every byte checked; one of the same id is replaced.

        What was pinned stays pinned.

        Args:
            path: Of its file, which is not needed any more afterwards.
            trusted: Public keys, one of which has to have signed it; none: it may be unsigned.
            pins: Whether it is pinned at once.

        Raises:
            InputError, CorruptDataError, RefusedError: As `read_cartridge`.
            CapacityError: There is no room, on the disk or among the pinned.
            After each of them nothing was changed.
        """

        def fill(file: BinaryIO, part: Path) -> Head:
            return copy_cartridge(path, file, trusted=trusted)

        return self._take(fill, pins)

    def register_contents(
        self,
        draft: Draft,
        contents: Contents,
        *,
        signing_key: SigningKey | None = None,
        pins: bool = False,
    ) -> Entry:
        """Make a cartridge of KV in memory, in the registry's own folder; else as `register`."""

        def fill(file: BinaryIO, part: Path) -> Head:
            write_into(file, draft, contents, signing_key)
            file.flush()
            return read_head(part)

        return self._take(fill, pins)

    def remove(self, cartridge_id: str, *, force: bool = False) -> bool:
        """Forget a cartridge and its file; whether it was there.

        Raises:
            RefusedError: It is pinned, and ``force`` is not set; nothing was changed.
        """
        with self._changing() as connection:
            row = connection.execute(
                "SELECT is_pinned FROM cartridges WHERE cartridge_id = ?", (cartridge_id,)
            ).fetchone()
            if row is not None and row[0] and not force:
                raise RefusedError(
                    f"cartridge {cartridge_id} is pinned: unpin it first, or force its removal"
                )
            connection.execute("DELETE FROM cartridges WHERE cartridge_id = ?", (cartridge_id,))
        self.collect_garbage()
        return row is not None

    def pin(self, cartridge_id: str) -> None:
        """Keep a cartridge from being removed, and resident in the host's memory.

        Raises:
            InputError: There is none of that id.
            CapacityError: The pinned ones would be larger than the host's budget.
        """
        with self._changing() as connection:
            _set_pinned(connection, cartridge_id, True)
            _check_pinned(connection)

    def unpin(self, cartridge_id: str) -> None:
        """Undo `pin`.

        Raises:
            InputError: There is none of that id.
        """
        with self._changing() as connection:
            _set_pinned(connection, cartridge_id, False)

    # ---- Budgets

    def budget(self, place: Place) -> int | None:
        """Bytes of KV that cartridges may take there; None: nobody has said."""
        with self._using() as connection:
            return _budget(connection, place)

    def set_budget(self, place: Place, bytes_max: int | None) -> None:
        """Say how many bytes of KV cartridges may take there; None: as many as there is room for.

        Raises:
            InputError: It is no size.
            CapacityError: What is pinned is larger; nothing was changed.
        """
        if place not in get_args(Place):
            raise InputError(f"{place!r} is no place: choose from {', '.join(get_args(Place))}")
        if bytes_max is not None and not 0 <= bytes_max <= BYTES_MAX:
            raise InputError(f"a budget has 0 to {BYTES_MAX} bytes, not {bytes_max}")
        with self._changing() as connection:
            connection.execute("DELETE FROM budgets WHERE place = ?", (place,))
            if bytes_max is not None:
                connection.execute("INSERT INTO budgets VALUES (?, ?)", (place, bytes_max))
            _check_pinned(connection)

    def pinned_bytes(self) -> int:
        """Bytes of KV of all pinned cartridges."""
        with self._using() as connection:
            return _pinned_bytes(connection)

    # ---- Files

    def collect_garbage(self) -> list[str]:
        """Remove files that no cartridge names and nobody is writing; their names, in order.

        A file that can't be removed stays, and is garbage the next time.
        """
        removed = []
        # The lock: no new file is made. The transaction: none gets its row meanwhile.
        with (
            told_of_writing(self._files),
            locked(self._folder),
            self._changing() as connection,
        ):
            rows = connection.execute("SELECT digest FROM cartridges")
            named = {f"{digest}{SUFFIX}" for (digest,) in rows}
            for path in sorted(self._files.iterdir()):
                is_garbage = path.suffix == SUFFIX and path.name not in named
                is_garbage |= path.suffix == PART_SUFFIX and not _is_held(path)
                if is_garbage:
                    with contextlib.suppress(OSError):
                        path.unlink()
                        removed.append(path.name)
        return removed

    def _take(self, fill: Callable[[BinaryIO, Path], Head], pins: bool) -> Entry:
        """Let ``fill`` write a file, then give it its name and its row at once."""
        with told_of_writing(self._files), self._part() as (file, part):
            head = fill(file, part)
            file.flush()
            os.fsync(file.fileno())
            path = self._files / f"{head.digest}{SUFFIX}"
            with self._changing() as connection:
                self._insert(connection, head, pins)
                _check_pinned(connection)
                os.replace(part, path)
        self.collect_garbage()
        entry = self.get(head.manifest.cartridge_id)
        if entry is None or entry.digest != head.digest:
            raise RefusedError(
                f"cartridge {head.manifest.cartridge_id} was replaced or removed by another at the "
                "same time: look again"
            )
        return entry

    @contextlib.contextmanager
    def _part(self) -> Iterator[tuple[BinaryIO, Path]]:
        """A new file that is garbage unless it gets another name; locked while it is written."""
        with locked(self._folder):
            fd, name = tempfile.mkstemp(suffix=PART_SUFFIX, dir=self._files)
            fcntl.flock(fd, fcntl.LOCK_EX)
        part = Path(name)
        try:
            with os.fdopen(fd, "wb") as file:
                yield file, part
        finally:
            part.unlink(missing_ok=True)

    def _insert(self, connection: sqlite3.Connection, head: Head, pins: bool) -> None:
        manifest = head.manifest
        row = connection.execute(
            "SELECT is_pinned FROM cartridges WHERE cartridge_id = ?", (manifest.cartridge_id,)
        ).fetchone()
        is_pinned = pins or (row is not None and bool(row[0]))
        connection.execute(
            "DELETE FROM cartridges WHERE cartridge_id = ?", (manifest.cartridge_id,)
        )
        values = (
            manifest.cartridge_id, manifest.model, head.digest, manifest.encoded(), head.signer,
            head.file_bytes, manifest.kv_bytes, self._wall_s(), int(is_pinned),
        )  # fmt: skip
        connection.execute("INSERT INTO cartridges VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
        connection.executemany(
            "INSERT INTO labels VALUES (?, ?, ?)",
            [(manifest.cartridge_id, name, value) for name, value in manifest.labels.items()],
        )

    # ---- The database

    def _entries(self, where: str, values: Sequence[str]) -> list[Entry]:
        query = f"SELECT {_COLUMNS} FROM cartridges {where} ORDER BY cartridge_id"
        with self._using() as connection:
            rows = connection.execute(query, values).fetchall()
        return [self._entry(row) for row in rows]

    def _entry(self, row: tuple[str, bytes, str, str, int, int, float, int]) -> Entry:
        cartridge_id, text, digest, signer, file_bytes, _, registered_s, is_pinned = row
        manifest = parse_manifest(text, f"cartridge {cartridge_id} in {self._path}")
        path = self._files / f"{digest}{SUFFIX}"
        return Entry(manifest, path, digest, signer, file_bytes, registered_s, bool(is_pinned))

    @contextlib.contextmanager
    def _using(self) -> Iterator[sqlite3.Connection]:
        with self._lock, told_of(self._path):
            yield self._connection

    @contextlib.contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """All of a block or nothing, with no other writer between."""
        with self._using() as connection, transaction(connection):
            yield connection


def _set_pinned(connection: sqlite3.Connection, cartridge_id: str, is_pinned: bool) -> None:
    done = connection.execute(
        "UPDATE cartridges SET is_pinned = ? WHERE cartridge_id = ?", (int(is_pinned), cartridge_id)
    )
    if done.rowcount == 0:
        raise _unknown(cartridge_id)


def _check_pinned(connection: sqlite3.Connection) -> None:
    """Refuse what would pin more than the host's memory may hold."""
    bytes_max, pinned_bytes = _budget(connection, "host"), _pinned_bytes(connection)
    if bytes_max is not None and pinned_bytes > bytes_max:
        raise CapacityError(
            f"pinned cartridges would take {pinned_bytes} bytes and the host's budget is "
            f"{bytes_max}: unpin another, or raise the budget"
        )


def _budget(connection: sqlite3.Connection, place: Place) -> int | None:
    row = connection.execute("SELECT bytes_max FROM budgets WHERE place = ?", (place,)).fetchone()
    return None if row is None else int(row[0])


def _pinned_bytes(connection: sqlite3.Connection) -> int:
    query = "SELECT coalesce(sum(kv_bytes), 0) FROM cartridges WHERE is_pinned"
    return int(connection.execute(query).fetchone()[0])


def _is_held(path: Path) -> bool:
    """Whether a process is writing a file: it holds its lock."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def _unknown(cartridge_id: str) -> InputError:
    return InputError(
        f"there is no cartridge {cartridge_id!r}: see kvkeep cartridge ls, and register it"
    )
