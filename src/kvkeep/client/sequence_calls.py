"""One request to a daemon's sequences and its answer, within a deadline and within bounds.

Blocking; every wait for the network ends at the deadline. Connections are kept and shared between
threads, one request at a time on each.
"""

import http.client
import json
import select
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
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
    connection: http.client.HTTPConnection
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
            self._host, self._port = parts.hostname or "", parts.port or 80
        except ValueError:
            parts, self._host = urlsplit(""), ""
        if parts.scheme != "http" or not self._host or parts.path.strip("/") or parts.query:
            raise InputError(
                f"{self.url[:200]!r} is not a daemon's address: write one like "
                "http://127.0.0.1:7000"
            )

    def close(self) -> None:
        """Close what is idle."""
        with self._lock:
            idle, self._idle = self._idle, []
        for each in idle:
            each.connection.close()

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
        connection = self._take()
        try:
            is_whole = self._send(connection, method, path, body, deadline_s)
            reply, is_kept = self._receive(connection, deadline_s, answer_bytes_max)
        except BaseException as error:
            connection.close()
            if isinstance(error, OSError | http.client.HTTPException):
                raise UnavailableError(
                    f"{method} at the daemon {self.url} got no whole answer in time: {error!r}"
                ) from error
            raise
        self._give(connection, is_kept=is_kept and is_whole)
        return reply

    def _take(self) -> http.client.HTTPConnection:
        now_s = self.clock.now_s()
        while True:
            with self._lock:
                idle = self._idle.pop() if self._idle else None
            if idle is None:
                return http.client.HTTPConnection(self._host, self._port)
            if now_s - idle.since_s < IDLE_S_MAX and not _has_news(idle.connection):
                return idle.connection
            idle.connection.close()

    def _give(self, connection: http.client.HTTPConnection, *, is_kept: bool) -> None:
        with self._lock:
            if is_kept and len(self._idle) < IDLE_CONNECTIONS_MAX:
                self._idle.append(_Idle(connection, self.clock.now_s()))
                return
        connection.close()

    def _wait(self, connection: http.client.HTTPConnection, deadline_s: float) -> None:
        """Let the next wait for the network end at the deadline."""
        left_s = deadline_s - self.clock.now_s()
        if left_s <= 0:
            raise TimeoutError("the deadline passed")
        connection.timeout = left_s
        if connection.sock is not None:
            connection.sock.settimeout(left_s)

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: list[bytes | memoryview],
        deadline_s: float,
    ) -> bool:
        """Send a request; whether all of it went out."""
        self._wait(connection, deadline_s)
        if connection.sock is None:
            connection.connect()
        connection.putrequest(method, path, skip_accept_encoding=True)
        if self.key:
            connection.putheader("Authorization", f"Bearer {self.key}")
        if body:
            connection.putheader("Content-Length", str(sum(map(len, body))))
            connection.putheader(DIGEST_HEADER, _digest_of(body))
        self._wait(connection, deadline_s)
        try:
            connection.endheaders()
            for part in _in_runs(body):
                self._send_part(connection, memoryview(part), deadline_s)
        except (BrokenPipeError, ConnectionResetError):
            # Whoever refuses a body may close before all of it was sent, and has said why.
            return False
        return True

    def _send_part(
        self, connection: http.client.HTTPConnection, part: memoryview, deadline_s: float
    ) -> None:
        while part:
            self._wait(connection, deadline_s)
            part = part[connection.sock.send(part) :]

    def _receive(
        self, connection: http.client.HTTPConnection, deadline_s: float, answer_bytes_max: int
    ) -> tuple[Reply, bool]:
        self._wait(connection, deadline_s)
        answer = connection.getresponse()
        num_bytes = answer.length
        if num_bytes is None or num_bytes > answer_bytes_max:
            raise http.client.HTTPException(f"an answer of {num_bytes} bytes, too long or unknown")
        body = np.empty(num_bytes, dtype=np.uint8).data
        filled = 0
        while filled < num_bytes:
            self._wait(connection, deadline_s)
            # One wait for the network each: ``answer.readinto`` would take many.
            num_read = answer.fp.readinto1(body[filled:])
            if not num_read:
                raise http.client.IncompleteRead(b"", num_bytes - filled)
            filled += num_read
        is_kept = not answer.will_close
        answer.close()
        digest = answer.getheader(DIGEST_HEADER)
        return Reply(answer.status, body.toreadonly(), digest), is_kept


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


def _has_news(connection: http.client.HTTPConnection) -> bool:
    """Whether an idle connection is over: nothing is expected on it but its end."""
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
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
