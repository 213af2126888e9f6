"""One request to a daemon's sequences and its answer, within a deadline and within bounds.

Blocking; every wait for the network ends at the deadline. Connections are kept and shared between
threads, one request at a time on each.
"""

import http.client
import io
import json
import select
import socket
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
import xxhash

from kvkeep.model.clock import Clock
from kvkeep.model.errors import (
    CapacityError,
    CorruptDataError,
    InputError,
    KvkeepError,
    RefusedError,
    UnavailableError,
)
from kvkeep.protocol.sequence_body import DIGEST_HEADER

IDLE_CONNECTIONS_MAX = 8
IDLE_S_MAX = 30.0
"""Daemons close what is idle for longer than twice this."""
RUN_BYTES = 64 << 10


@dataclass(frozen=True)
class Reply:
    """What a daemon said."""

    status: int
    body: memoryview
    digest: str | None = None
    """What its bytes sum up to, as the daemon says; see ``check``."""

    def check(self) -> None:
        """Refuse a body whose bytes are not those that were sent.

        Raises:
            CorruptDataError: They are others, or nobody said what they sum up to.
        """
        if self.digest is None or self.digest != xxhash.xxh3_128_hexdigest(self.body):
            raise CorruptDataError(
                "what came from the daemon was changed on the way: ask for it again"
            )

    def json(self) -> dict[str, Any]:
        """The body as an object.

        Raises:
            UnavailableError: It is none: somebody else answers there.
        """
        try:
            found = json.loads(bytes(self.body))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UnavailableError("what answers there is no daemon's listener for sequences")
        return found


@dataclass
class _Idle:
    sock: socket.socket
    since_s: float


@dataclass
class Peer:
    """One daemon's address, and the connections to it."""

    url: str
    key: str
    clock: Clock
    _idle: list[_Idle] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            self._address = parts.hostname or "", parts.port or 80
        except ValueError:
            parts, self._address = urlsplit(""), ("", 0)
        is_plain = self.url.isascii() and self.url.isprintable()
        if parts.scheme != "http" or not self._address[0] or parts.path.strip("/") or parts.query:
            is_plain = False
        if not is_plain:
            raise InputError(
                f"{self.url[:200]!r} is not a daemon's address: write one like "
                "http://127.0.0.1:7000"
            )
        if not (self.key.isascii() and self.key.isprintable()):
            raise InputError("a daemon's key has ASCII characters on one line: mend it")
        self._host = parts.netloc.rpartition("@")[2]

    def close(self) -> None:
        """Close what is idle."""
        with self._lock:
            idle, self._idle = self._idle, []
        for each in idle:
            each.sock.close()

    def call(
        self,
        method: str,
        path: str,
        parts: Iterable[bytes | memoryview],
        *,
        deadline_s: float,
        answer_bytes_max: int,
    ) -> Reply:
        """Ask once. Nothing is ever asked twice by itself.

        Args:
            method: Of HTTP.
            path: Encoded already.
            parts: The body, in order.
            deadline_s: When to give up, by the clock.
            answer_bytes_max: The longest answer that is taken.

        Raises:
            UnavailableError: No whole answer came in time. What was asked was done whole, or not
                at all.
        """
        body = list(parts)
        connection = None
        try:
            connection = _Timed(self._take(deadline_s), self.clock, deadline_s)
            is_whole = self._send(connection, method, path, body)
            reply, is_kept = _receive(connection, method, answer_bytes_max)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if connection is not None:
                connection.sock.close()
            raise UnavailableError(
                f"{method} at the daemon {self.url} got no whole answer in time: {error!r}"
            ) from error
        except BaseException:
            if connection is not None:
                connection.sock.close()
            raise
        self._give(connection.sock, is_kept=is_kept and is_whole)
        return reply

    def _take(self, deadline_s: float) -> socket.socket:
        while True:
            now_s = self.clock.now_s()
            with self._lock:
                idle = self._idle.pop() if self._idle else None
            if idle is None:
                if now_s >= deadline_s:
                    raise TimeoutError("the deadline passed")
                sock = socket.create_connection(self._address, deadline_s - now_s)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return sock
            if now_s - idle.since_s < IDLE_S_MAX and not _has_news(idle.sock):
                return idle.sock
            idle.sock.close()

    def _give(self, sock: socket.socket, *, is_kept: bool) -> None:
        with self._lock:
            if is_kept and len(self._idle) < IDLE_CONNECTIONS_MAX:
                self._idle.append(_Idle(sock, self.clock.now_s()))
                return
        sock.close()

    def _send(
        self, connection: "_Timed", method: str, path: str, body: list[bytes | memoryview]
    ) -> bool:
        """Send a request; whether all of it went out."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._host}"]
        if self.key:
            lines.append(f"Authorization: Bearer {self.key}")
        if body:
            lines.append(f"Content-Length: {sum(map(len, body))}")
            lines.append(f"{DIGEST_HEADER}: {_digest_of(body)}")
        try:
            for part in _in_runs(["\r\n".join([*lines, "", ""]).encode("ascii"), *body]):
                connection.send(memoryview(part))
        except (BrokenPipeError, ConnectionResetError):
            # Whoever refuses a body may close before all of it was sent, and has said why.
            return False
        return True


class _Timed(io.RawIOBase):
    """A connection on which every wait ends at one deadline, however slowly bytes come."""

    def __init__(self, sock: socket.socket, clock: Clock, deadline_s: float) -> None:
        self.sock = sock
        self._clock = clock
        self._deadline_s = deadline_s

    def _wait(self) -> None:
        """Let the next wait for the network end at the deadline."""
        left_s = self._deadline_s - self._clock.now_s()
        if left_s <= 0:
            raise TimeoutError("the deadline passed")
        self.sock.settimeout(left_s)

    def send(self, part: memoryview) -> None:
        """Send all of it."""
        while part:
            self._wait()
            part = part[self.sock.send(part) :]

    def readable(self) -> bool:
        """As a file is asked."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Some bytes; none at the end."""
        self._wait()
        return self.sock.recv_into(buffer)

    def makefile(self, _mode: str) -> io.BufferedReader:
        """What ``HTTPResponse`` reads from; closing it leaves the connection open."""
        return io.BufferedReader(self)


def _receive(connection: _Timed, method: str, answer_bytes_max: int) -> tuple[Reply, bool]:
    """An answer, and whether the connection can be used again."""
    answer = http.client.HTTPResponse(cast("socket.socket", connection), method=method)
    answer.begin()
    num_bytes = answer.length
    if num_bytes is None or num_bytes > answer_bytes_max:
        raise http.client.HTTPException(f"an answer of {num_bytes} bytes, too long or unknown")
    body = np.empty(num_bytes, dtype=np.uint8).data
    filled = answer.readinto(body) if num_bytes else 0
    if filled < num_bytes:
        raise http.client.IncompleteRead(b"", num_bytes - filled)
    digest = answer.getheader(DIGEST_HEADER)
    return Reply(answer.status, body.toreadonly(), digest), not answer.will_close


def _in_runs(parts: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The same bytes; what is short goes out together, for each send costs both sides alike."""
    run: list[bytes | memoryview] = []
    run_bytes = 0
    for part in parts:
        if len(part) >= RUN_BYTES:
            yield b"".join(run)
            run, run_bytes = [], 0
            yield part
            continue
        run.append(part)
        run_bytes += len(part)
        if run_bytes >= RUN_BYTES:
            yield b"".join(run)
            run, run_bytes = [], 0
    yield b"".join(run)


def _digest_of(parts: Iterable[bytes | memoryview]) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _has_news(sock: socket.socket) -> bool:
    """Whether an idle connection is over: nothing is expected on it but its end."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def refusal_of(reply: Reply) -> KvkeepError:
    """What a caller is to do about an answer that is a refusal."""
    try:
        message = str(reply.json()["error"]["message"])
    except (UnavailableError, KeyError, TypeError):
        message = f"the daemon answered {reply.status}"
    match reply.status:
        case 404 | 409 | 401 | 403:
            return RefusedError(message)
        case 413 | 429 | 507:
            return CapacityError(message)
        case 422:
            return CorruptDataError(message)
        case status if 400 <= status < 500 and status != 408:
            return InputError(message)
        case _:
            return UnavailableError(message)
