"""One connection to a Valkey or Redis server: commands out, replies in, values into memory.

Speaks RESP 2, which every server of either kind starts with. A client library would hand over each
value as a new object; here a value crosses the process once, from the socket into the caller's
memory, and one deadline holds for a whole exchange (decision 0011).

Everything that goes wrong with a connection is an ``OSError``; after one the connection is of no
more use, as replies may be under way.
"""

import re
import socket
import ssl
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import SplitResult, unquote

from kvkeep.model import addresses
from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import InputError

Piece = bytes | memoryview

PORT_DEFAULT: Final = 6379
DATABASE_MAX: Final = (1 << 31) - 1
"""The largest number that a server reads."""
BUFFER_BYTES: Final = 4096
"""For the lines between values: small, as what of a value falls into it is copied once more."""
PIECES_MAX: Final = 512
"""In one system call; the kernel takes 1024 (``IOV_MAX``)."""
SKIP_BYTES: Final = 1 << 18
"""Read and forgotten at a time."""
REPLY_BYTES_MAX: Final = 16 << 20
"""Of a reply that is no value, with ``ELEMENT_BYTES`` on each of its elements; the names of a
thousand blocks have 220 kB."""
ELEMENT_BYTES: Final = 64
"""What an element costs here, however short it is."""
_NUMBER: Final = re.compile(rb"-?[0-9]{1,18}")
_NOT_VALKEY: Final = "it does not speak the protocol of Valkey: check host, port and TLS"


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a server is, without what opens it."""

    host: str = ""
    port: int = PORT_DEFAULT
    unix_path: str = ""
    """Instead of host and port."""
    is_tls: bool = False
    database: int = 0

    def __str__(self) -> str:
        return self.unix_path or f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """A server's answer that it will not."""

    code: str
    """Its first word, such as ``OOM``."""
    text: str
    """All of it, printable, at most 200 characters."""

    @classmethod
    def parse(cls, line: bytes) -> "ErrorReply":
        """Read an error line, without its leading ``-``."""
        text = "".join(
            char if char.isprintable() else "?" for char in line.decode(errors="replace")
        )
        return cls(text.partition(" ")[0], text[:200])


Reply = int | bytes | ErrorReply | list["Reply"] | None


def parse_url(url: str) -> tuple[ServerAddress, str | None, str | None]:
    """Read ``valkey://[user[:password]@]host[:port][/database]``.

    ``valkeys`` and ``rediss`` are TLS, ``redis`` is the same as ``valkey``, and ``unix:///path`` is
    a Unix socket.

    Returns:
        Address, user, password.

    Raises:
        InputError: It is none of these. The message holds nothing of the address, as it may hold a
            password.
    """
    try:
        return _parsed(addresses.split_url(url))
    except ValueError as error:
        raise InputError(
            f"the address of the Valkey server can't be, {error}: mend `url`"
        ) from None


def _parsed(parts: SplitResult) -> tuple[ServerAddress, str | None, str | None]:
    user, password = (unquote(text) if text else None for text in (parts.username, parts.password))
    if parts.scheme == "unix" and parts.path:
        path = unquote(parts.path)
        addresses.check_socket_path(path)
        return ServerAddress(unix_path=path), user, password
    port = addresses.port_of(parts, PORT_DEFAULT)
    database = parts.path.strip("/") or "0"
    if parts.scheme not in ("valkey", "valkeys", "redis", "rediss") or not parts.hostname:
        raise InputError(
            "the address of a Valkey server is written valkey://host:port/0, valkeys:// for TLS, "
            "or unix:///path: mend `url`"
        )
    is_number = database.isascii() and database.isdigit() and len(database) <= 10
    if not is_number or parts.query or parts.fragment:
        raise InputError(
            "behind host and port of a Valkey server's `url` stands a database number or nothing: "
            "set everything else as settings of their own"
        )
    if int(database) > DATABASE_MAX:
        raise ValueError(f"its database is none from 0 to {DATABASE_MAX}")
    is_tls = parts.scheme in ("valkeys", "rediss")
    addresses.checked_host(parts.hostname)
    return ServerAddress(parts.hostname, port, "", is_tls, int(database)), user, password


def pack_command(*words: Piece | str | int) -> bytes:
    """Return a command that holds no value."""
    packed: list[Piece] = [b"*%d\r\n" % len(words)]
    for word in words:
        data = word if isinstance(word, bytes | memoryview) else str(word).encode()
        packed += [b"$%d\r\n" % len(data), data, b"\r\n"]
    return b"".join(packed)


def connect(address: ServerAddress, tls: ssl.SSLContext | None, end_s: float) -> "WireConnection":
    """Open a connection; nothing has been said on it yet.

    Args:
        address: Whom to call.
        tls: Whom to trust; used where the address is TLS.
        end_s: When to give up, on the system clock.

    Raises:
        OSError: Nobody answers, or it is not whom the certificate should name.
    """
    sock = _opened_socket(address, end_s)
    try:
        if address.is_tls:
            context = tls or ssl.create_default_context()
            sock.settimeout(_left_s(end_s))
            sock = context.wrap_socket(sock, server_hostname=address.host)
        return WireConnection(sock)
    except BaseException:
        sock.close()
        raise


def _opened_socket(address: ServerAddress, end_s: float) -> socket.socket:
    if address.unix_path:
        return _connected(socket.AF_UNIX, address.unix_path, end_s)
    failure: OSError = OSError("its name has no address")
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    for family, _, _, _, target in found:
        try:
            sock = _connected(family, target, end_s)
        except OSError as error:
            failure = error
            continue
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    raise failure


def _connected(family: int, target: object, end_s: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(_left_s(end_s))
        sock.connect(target)  # type: ignore[arg-type]
    except BaseException:
        sock.close()
        raise
    return sock


def _left_s(end_s: float) -> float:
    left_s = end_s - SystemClock().now_s()
    if left_s <= 0:
        raise TimeoutError
    return left_s


class WireConnection:
    """A stream of commands and replies; used by one thread at a time.

    Every method gives up at ``end_s`` of the system clock with ``TimeoutError``.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._is_tls = isinstance(sock, ssl.SSLSocket)
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._begin = self._end = 0
        """What has arrived and was not read yet lies between these."""
        self._reply_bytes = 0
        if not self._is_tls:
            # The kernel waits for all bytes of a value in one call, and keeps the time.
            sock.setblocking(True)

    def close(self) -> None:
        """Hang up."""
        self._sock.close()

    def _limit(self, option: int, end_s: float) -> None:
        left_s = _left_s(end_s)
        if self._is_tls:
            self._sock.settimeout(left_s)
            return
        # Zero would be for ever.
        microseconds = max(1, round(left_s * 1e6))
        pair = struct.pack("@ll", *divmod(microseconds, 1_000_000))
        self._sock.setsockopt(socket.SOL_SOCKET, option, pair)

    # --- Out -------------------------------------------------------------------------------------

    def send(self, pieces: Sequence[Piece], end_s: float) -> None:
        """Send these bytes in order, without joining them."""
        try:
            if self._is_tls:
                for piece in pieces:
                    self._limit(socket.SO_SNDTIMEO, end_s)
                    self._sock.sendall(piece)
            else:
                self._send_plain([memoryview(piece) for piece in pieces if len(piece)], end_s)
        except BlockingIOError:
            raise TimeoutError from None

    def _send_plain(self, rest: list[memoryview], end_s: float) -> None:
        first = 0
        while first < len(rest):
            self._limit(socket.SO_SNDTIMEO, end_s)
            sent = self._sock.sendmsg(rest[first : first + PIECES_MAX])
            while first < len(rest) and sent >= len(rest[first]):
                sent -= len(rest[first])
                first += 1
            if sent:
                rest[first] = rest[first][sent:]

    # --- In --------------------------------------------------------------------------------------

    def _receive(self, into: memoryview, end_s: float, *, is_whole: bool) -> int:
        """Take what has arrived, or wait; all of ``into`` if ``is_whole``, unless time runs out."""
        self._limit(socket.SO_RCVTIMEO, end_s)
        flags = socket.MSG_WAITALL if is_whole and not self._is_tls else 0
        try:
            num_bytes = self._sock.recv_into(into, 0, flags)
        except (BlockingIOError, ssl.SSLWantReadError):
            raise TimeoutError from None
        if num_bytes == 0:
            raise ConnectionResetError("it hung up")
        return num_bytes

    def read_line(self, end_s: float) -> bytes:
        """Read up to the next line's end, and leave that out."""
        while (at := self._buffer.find(b"\r\n", self._begin, self._end)) < 0:
            left = self._end - self._begin
            self._view[:left] = self._view[self._begin : self._end]
            self._begin, self._end = 0, left
            if left == BUFFER_BYTES:
                raise ConnectionError(_NOT_VALKEY)
            self._end += self._receive(self._view[left:], end_s, is_whole=False)
        line = bytes(self._view[self._begin : at])
        self._begin = at + 2
        return line

    def read_into(self, into: memoryview, end_s: float) -> None:
        """Fill all of ``into``."""
        done = min(len(into), self._end - self._begin)
        into[:done] = self._view[self._begin : self._begin + done]
        self._begin += done
        while done < len(into):
            done += self._receive(into[done:], end_s, is_whole=True)

    def read_bytes(self, num_bytes: int, end_s: float) -> bytes:
        """Read a few bytes into an object of their own."""
        found = bytearray(num_bytes)
        self.read_into(memoryview(found), end_s)
        return bytes(found)

    def skip(self, num_bytes: int, end_s: float) -> None:
        """Read and forget."""
        while num_bytes > 0:
            step = min(num_bytes, SKIP_BYTES)
            self.read_bytes(step, end_s)
            num_bytes -= step

    def read_bulk_length(self, end_s: float) -> int | ErrorReply | None:
        """Read how many bytes of a value follow, before ``end_bulk``; None for no value."""
        line = self.read_line(end_s)
        if line[:1] == b"-":
            return ErrorReply.parse(line[1:])
        if line[:1] != b"$":
            raise ConnectionError(_NOT_VALKEY)
        length = _number(line)
        return None if length < 0 else length

    def end_bulk(self, end_s: float) -> None:
        """Read the end of a value, once all its bytes are read."""
        if self.read_bytes(2, end_s) != b"\r\n":
            raise ConnectionError(_NOT_VALKEY)

    def read_reply(self, end_s: float) -> Reply:
        """Read one reply that holds no value."""
        self._reply_bytes = 0
        return self._read_reply(end_s, 0)

    def _read_reply(self, end_s: float, depth: int) -> Reply:
        line = self.read_line(end_s)
        self._count(len(line))
        kind = line[:1]
        if kind == b"+":
            return line[1:]
        if kind == b"-":
            return ErrorReply.parse(line[1:])
        if kind == b":":
            return _number(line)
        if kind == b"$":
            return self._read_text(_number(line), end_s)
        if kind == b"*" and depth < 2:
            return [self._read_reply(end_s, depth + 1) for _ in range(_number(line))]
        raise ConnectionError(_NOT_VALKEY)

    def _read_text(self, num_bytes: int, end_s: float) -> bytes | None:
        if num_bytes < 0:
            return None
        self._count(num_bytes)
        text = self.read_bytes(num_bytes, end_s)
        self.end_bulk(end_s)
        return text

    def _count(self, num_bytes: int) -> None:
        # Before the bytes are taken: a wrong length must not cost memory.
        self._reply_bytes += num_bytes + ELEMENT_BYTES
        if self._reply_bytes > REPLY_BYTES_MAX:
            raise ConnectionError(_NOT_VALKEY)


def _number(line: bytes) -> int:
    if not _NUMBER.fullmatch(line, 1):
        raise ConnectionError(_NOT_VALKEY)
    return int(line[1:])
