"""A Valkey or Redis server that keeps blocks.

One string per block: a head (``entry_names``) and the bytes. Commands of a batch are sent ahead of
their replies, up to a number of bytes, so that the server works while bytes are on their way. What
the server forgets by its own policy is a miss.
"""

import os
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.model.ids import BlockKey
from kvkeep.tiers.base import Parts, length_of
from kvkeep.tiers.entry_names import (
    HEAD_BYTES,
    PREFIX_DEFAULT,
    DamagedHeads,
    checked_prefix,
    entry_name,
    is_head_of,
    pack_head,
    parse_entry_name,
)
from kvkeep.tiers.valkey_wire import (
    ErrorReply,
    Piece,
    Reply,
    WireConnection,
    connect,
    pack_command,
    parse_url,
)

Answer = TypeVar("Answer")

AHEAD_BYTES: Final = 8 << 20
"""Of values that are under way at once on one connection: hides a round trip at 10 GB/s."""
AHEAD_MIN: Final = 2
"""Commands under way at once however large their values are, or the server would wait for us."""
SERVER_VALUE_BYTES_MAX: Final = (512 << 20) - HEAD_BYTES
"""The longest string a server takes by default (``proto-max-bulk-len``)."""
IDLE_MAX: Final = 16
"""Connections kept for later; as many as threads that use a tier at once."""
IDLE_S: Final = 60.0
"""A connection that was not needed for so long is closed: a server lets in only so many."""
SCAN_COUNT: Final = 1000
"""Names looked at per question for all keys: a fraction of a millisecond of the server's time."""

_SENTENCES: Final = {
    "NOAUTH": "asks for a password: set VALKEY_PASSWORD (and VALKEY_USER where it knows users)",
    "WRONGPASS": "does not know this user and password: mend VALKEY_USER and VALKEY_PASSWORD",
    "NOPERM": "does not let this user work: allow it get, set, del, strlen and scan on the prefix",
    "LOADING": "is still loading its data: it answers when it is done",
    "READONLY": "is a replica and takes no writes: name its primary",
    "MASTERDOWN": "is a replica that has lost its primary: name the primary",
    "MISCONF": "can't save to its disk and so takes no writes: make room there",
    "MOVED": "is one of a cluster: name a server without cluster mode",
    "CLUSTERDOWN": "is one of a cluster: name a server without cluster mode",
    "BUSY": "is busy with somebody's script: it answers when that has ended",
}
"""What to do about the first words of error replies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValkeySettings:
    """Which server, and how it is used."""

    url: str = field(default="valkey://127.0.0.1:6379/0", repr=False)
    """``valkey://host:port/database``, ``valkeys://`` for TLS, or ``unix:///path``."""
    user: str | None = None
    """Beats the environment's ``VALKEY_USER``; both beat one in ``url``."""
    password: str | None = field(default=None, repr=False)
    """Beats the environment's ``VALKEY_PASSWORD``; both beat one in ``url``."""
    ca_file: str = ""
    """Certificates to trust under TLS; empty: the system's."""
    prefix: str = PREFIX_DEFAULT
    """Before every key; deployments that share a server differ in it."""
    timeout_s: float = 5.0
    """For one call, whole: choose batches so that they end in a fraction of it."""
    ttl_s: float | None = None
    """The server forgets a value so long after it was written; None: by its own policy only."""

    def __post_init__(self) -> None:
        checked_prefix(self.prefix)
        if not 0.01 <= self.timeout_s <= 3600:
            raise InputError(f"timeout_s is from 0.01 to 3600 seconds: got {self.timeout_s}")
        if self.ttl_s is not None and not 0.001 <= self.ttl_s <= 1e9:
            raise InputError(f"ttl_s is from 0.001 to 1e9 seconds: got {self.ttl_s}")


class ValkeyTier:
    """Keeps blocks as strings on one server. Thread-safe; one connection per thread at work."""

    def __init__(self, settings: ValkeySettings, name: str = "valkey") -> None:
        """Prepare; the server is called with the first batch.

        Raises:
            InputError: A setting is wrong.
        """
        self.name = name
        self._settings = settings
        self._address, user, password = parse_url(settings.url)
        self._user = settings.user or os.environ.get("VALKEY_USER") or user
        self._password = settings.password or os.environ.get("VALKEY_PASSWORD") or password
        self._tls = _trusted(settings.ca_file) if self._address.is_tls else None
        self._clock = SystemClock()
        self._lock = threading.Lock()
        self._idle: list[tuple[WireConnection, float]] = []
        """With the time since when, in seconds; the latest last, and taken first."""
        self._is_closed = False
        self._damaged = DamagedHeads(name)

    def __repr__(self) -> str:
        return f"ValkeyTier({str(self._address)!r}, prefix={self._settings.prefix!r})"

    @property
    def num_rotten(self) -> int:
        """Values with damaged heads that reads found, and dropped."""
        return self._damaged.number

    # --- The tier --------------------------------------------------------------------------------

    def write(self, keys: Sequence[BlockKey], values: Sequence[Parts]) -> list[bool]:
        """Keep these values; declines one for which the server has no memory."""
        kept = [False] * len(keys)
        lengths = [length_of(value) for value in values]
        taken = [i for i, length in enumerate(lengths) if length <= SERVER_VALUE_BYTES_MAX]
        commands = [(self._set_command(keys[i], values[i], lengths[i]), lengths[i]) for i in taken]

        def hear(connection: WireConnection, command_idx: int, end_s: float) -> None:
            reply = connection.read_reply(end_s)
            if reply != b"OK" and not (isinstance(reply, ErrorReply) and reply.code == "OOM"):
                raise self._refused(reply)
            kept[taken[command_idx]] = reply == b"OK"

        self._exchange(commands, hear)
        return kept

    def _set_command(self, key: BlockKey, value: Parts, value_bytes: int) -> list[Piece]:
        name = entry_name(key, self._settings.prefix)
        ttl_s = self._settings.ttl_s
        expiry = b"" if ttl_s is None else _as_words("PX", max(1, round(ttl_s * 1000)))
        begin = b"*%d\r\n" % (3 if ttl_s is None else 5) + _as_words("SET", name)
        length = b"$%d\r\n" % (HEAD_BYTES + value_bytes)
        return [begin + length + pack_head(name, value_bytes), *value, b"\r\n" + expiry]

    def read(self, keys: Sequence[BlockKey], into: Sequence[Parts]) -> list[int | None]:
        """Read straight into the caller's memory; drops those whose head is damaged."""
        found: list[int | None] = [None] * len(keys)
        names = [entry_name(key, self._settings.prefix) for key in keys]
        commands: list[tuple[list[Piece], int]] = [
            ([pack_command("GET", name)], length_of(room))
            for name, room in zip(names, into, strict=True)
        ]

        damaged: set[int] = set()  # a set, as a batch may be heard twice

        def hear(connection: WireConnection, idx: int, end_s: float) -> None:
            is_whole, found[idx] = self._receive(connection, names[idx], into[idx], end_s)
            if not is_whole:
                damaged.add(idx)

        self._exchange(commands, hear)
        self._damaged.drop([keys[idx] for idx in sorted(damaged)], self.delete)
        return found

    def _receive(
        self, connection: WireConnection, name: str, room: Parts, end_s: float
    ) -> tuple[bool, int | None]:
        """Hear one value.

        Returns:
            False where what stands under this name is damaged; and the bytes of the value, None
            where there is none that fits.
        """
        length = connection.read_bulk_length(end_s)
        if isinstance(length, ErrorReply):
            if length.code == "WRONGTYPE":
                return True, None  # no string: somebody else's
            raise self._refused(length)
        if length is None:
            return True, None
        head = connection.read_bytes(min(length, HEAD_BYTES), end_s)
        value_bytes = left = length - HEAD_BYTES
        is_whole = is_head_of(head, name, value_bytes)
        if not is_whole or value_bytes > length_of(room):
            connection.skip(max(0, value_bytes), end_s)
            connection.end_bulk(end_s)
            return is_whole, None
        for part in room:
            piece = part[:left]
            connection.read_into(piece, end_s)
            left -= len(piece)
        connection.end_bulk(end_s)
        return True, value_bytes

    def lookup(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Ask for lengths: a string shorter than a head is none of ours."""
        found = [False] * len(keys)
        commands: list[tuple[list[Piece], int]] = [
            ([pack_command("STRLEN", entry_name(key, self._settings.prefix))], 0) for key in keys
        ]

        def hear(connection: WireConnection, idx: int, end_s: float) -> None:
            reply = connection.read_reply(end_s)
            if isinstance(reply, ErrorReply) and reply.code == "WRONGTYPE":
                return
            if not isinstance(reply, int):
                raise self._refused(reply)
            found[idx] = reply >= HEAD_BYTES

        self._exchange(commands, hear)
        return found

    def keys(self) -> Iterator[BlockKey]:
        """Go through the server's names; each page has the time of a call."""
        # The server may name a key twice. Hashes of names take a fifth of the names' room.
        seen: set[int] = set()
        cursor = b"0"
        while True:
            cursor, names = self._scan(cursor)
            for name in names:
                key = parse_entry_name(name.decode("ascii", "replace"), self._settings.prefix)
                if key is not None and hash(name) not in seen:
                    seen.add(hash(name))
                    yield key
            if cursor == b"0":
                return

    def _scan(self, cursor: bytes) -> tuple[bytes, list[bytes]]:
        pattern = f"{self._settings.prefix}*"  # a checked prefix holds no other sign of a pattern
        command = pack_command("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_COUNT)
        reply = self._ask(command)
        if isinstance(reply, list) and len(reply) == 2:
            begin, names = reply
            if isinstance(begin, bytes) and isinstance(names, list):
                return begin, [name for name in names if isinstance(name, bytes)]
        raise self._refused(reply)

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Forget; the server gives the memory back in its own time."""
        if keys:
            names = [entry_name(key, self._settings.prefix) for key in keys]
            reply = self._ask(pack_command("UNLINK", *names))
            if not isinstance(reply, int):
                raise self._refused(reply)

    def close(self) -> None:
        """Hang up."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for connection, _ in idle:
            connection.close()

    # --- Talking ---------------------------------------------------------------------------------

    def _ask(self, command: bytes) -> Reply:
        replies: list[Reply] = []

        def hear(connection: WireConnection, _: int, end_s: float) -> None:
            replies[:] = [connection.read_reply(end_s)]

        self._exchange([([command], 0)], hear)
        return replies[0]

    def _exchange(
        self,
        commands: Sequence[tuple[Sequence[Piece], int]],
        hear: Callable[[WireConnection, int, float], None],
    ) -> None:
        """Send commands and hear each one's reply, in order.

        Args:
            commands: Pieces, and the bytes of the value that goes or comes with them.
            hear: Reads the reply to the command of this index, until this time.

        Raises:
            UnavailableError: The server can't be reached, or ``hear`` raised it. Some commands may
                have been done; commands may be sent twice.
        """
        if not commands:
            return
        end_s = self._clock.now_s() + self._settings.timeout_s
        try:
            connection = self._idle_connection()
            if connection is not None and self._has_talked(connection, commands, hear, end_s):
                return
            self._has_talked(self._new_connection(end_s), commands, hear, end_s, is_new=True)
        except OSError as error:
            raise UnavailableError(self._sentence(error)) from error

    def _has_talked(
        self,
        connection: WireConnection,
        commands: Sequence[tuple[Sequence[Piece], int]],
        hear: Callable[[WireConnection, int, float], None],
        end_s: float,
        *,
        is_new: bool = False,
    ) -> bool:
        """Exchange on this connection; False where it was an old one and had been lost."""
        is_whole = False
        try:
            _talk(connection, commands, hear, end_s)
            is_whole = True
        except (ConnectionError, ssl.SSLError):
            # A server that was started again has hung up on everyone: the others are lost as well.
            self._drop_idle()
            if is_new:
                raise
            return False
        finally:
            if is_whole:
                self._give_back(connection)
            else:
                connection.close()
        return True

    def _idle_connection(self) -> WireConnection | None:
        with self._lock:
            if self._is_closed:
                raise UnavailableError(f"{self.name} was closed: open it again")
            return self._idle.pop()[0] if self._idle else None

    def _give_back(self, connection: WireConnection) -> None:
        now_s = self._clock.now_s()
        unneeded = [connection]
        with self._lock:
            if not self._is_closed and len(self._idle) < IDLE_MAX:
                unneeded = [each for each, since_s in self._idle if now_s - since_s > IDLE_S]
                self._idle = [*self._idle[len(unneeded) :], (connection, now_s)]
        for each in unneeded:
            each.close()

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection, _ in idle:
            connection.close()

    def _new_connection(self, end_s: float) -> WireConnection:
        connection = connect(self._address, self._tls, end_s)
        try:
            self._introduce(connection, end_s)
        except BaseException:
            connection.close()
            raise
        return connection

    def _introduce(self, connection: WireConnection, end_s: float) -> None:
        greetings = []
        if self._password is not None:
            user = [] if self._user is None else [self._user]
            greetings.append(pack_command("AUTH", *user, self._password))
        if self._address.database:
            greetings.append(pack_command("SELECT", self._address.database))
        for greeting in greetings:
            connection.send([greeting], end_s)
            reply = connection.read_reply(end_s)
            if reply != b"OK":
                raise self._refused(reply)

    def _refused(self, reply: Reply) -> UnavailableError:
        where = f"the Valkey server at {self._address}"
        if not isinstance(reply, ErrorReply):
            return UnavailableError(f"{where} answered something else than it was asked")
        sentence = _SENTENCES.get(reply.code, f"answered {reply.text!r}: see its log")
        return UnavailableError(f"{where} {sentence}")

    def _sentence(self, error: OSError) -> str:
        where = f"the Valkey server at {self._address}"
        if isinstance(error, TimeoutError):
            return (
                f"{where} did not finish within {self._settings.timeout_s} s: "
                "see whether it is overloaded or stopped"
            )
        if isinstance(error, ssl.SSLError):
            reason = getattr(error, "verify_message", "") or error.reason or "no TLS there"
            return f"{where} can't be trusted: {reason}; see `url` and `ca_file`"
        return f"{where} can't be reached: {error.strerror or error}; see whether it runs"


def _talk(
    connection: WireConnection,
    commands: Sequence[tuple[Sequence[Piece], int]],
    hear: Callable[[WireConnection, int, float], None],
    end_s: float,
) -> None:
    """Keep at most ``AHEAD_BYTES`` under way, or ``AHEAD_MIN`` commands."""
    sent = ahead_bytes = 0
    for heard, (_, heard_bytes) in enumerate(commands):
        pieces: list[Piece] = []
        while sent < len(commands):
            next_pieces, next_bytes = commands[sent]
            if sent - heard >= AHEAD_MIN and ahead_bytes + next_bytes > AHEAD_BYTES:
                break
            pieces += next_pieces
            ahead_bytes += next_bytes
            sent += 1
        if pieces:
            connection.send(pieces, end_s)
        hear(connection, heard, end_s)
        ahead_bytes -= heard_bytes


def _as_words(*words: str | int) -> bytes:
    """Words of a command without its first line."""
    return pack_command(*words).partition(b"\r\n")[2]


def _trusted(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise InputError(f"{ca_file!r} holds no certificates to trust: mend `ca_file`") from error
