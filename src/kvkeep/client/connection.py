"""One greeted connection to a daemon; every call has a deadline.

What the kernel does not take at once is kept and sent along with later calls, so sending never
waits: a frozen daemon is noticed by the answer that does not come.

Not thread-safe: one thread uses a connection at a time. After an UnavailableError the connection is
of no more use; its leases end on the daemon's side when it is closed.
"""

import contextlib
import itertools
import os
import select
import socket
import struct
from collections.abc import Callable
from typing import TypeVar

from kvkeep.model.clock import Clock, SystemClock
from kvkeep.model.errors import InputError, RefusedError, UnavailableError
from kvkeep.protocol import codec
from kvkeep.protocol import messages as m
from kvkeep.protocol.frames import FRAME_BYTES_MAX, FrameReader

RECEIVE_BYTES = 1 << 18
SEND_BUFFER_BYTES = 1 << 20
"""Asked of the kernel, which may give less (net.core.wmem_max)."""
LOOK_UP_S = 0.1
"""How often a wait for a greeting looks whether it is still wanted."""
UNSENT_BYTES_MAX = 2 * FRAME_BYTES_MAX
"""Kept of what the kernel did not take; a daemon that lets more pile up does not read."""
_CREDENTIALS = struct.Struct("3i")

Reply = TypeVar(
    "Reply",
    m.Acquired,
    m.Reserved,
    m.Committed,
    m.Pong,
    m.Status,
    m.Cleared,
    m.Told,
    m.Prefetching,
)


class Connection:
    """A socket on which Hello was answered with Welcome."""

    def __init__(self, sock: socket.socket, clock: Clock) -> None:
        self._socket = sock
        self._clock = clock
        self._frames = FrameReader()
        self._unsent = bytearray()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._request_ids = itertools.count(1)
        self.welcome: m.Welcome | None = None

    @staticmethod
    def open(
        path: str,
        hello: m.Hello,
        timeout_s: float,
        clock: Clock | None = None,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> "Connection":
        """Connect and greet.

        Args:
            path: Of the daemon's control socket.
            hello: The greeting.
            timeout_s: Longest wait for the answer to it.
            clock: Monotonic; the system's if None.
            is_wanted: Asked now and then while waiting; False ends the wait.

        Raises:
            UnavailableError: Nobody answers within ``timeout_s``.
            RefusedError: The daemon gives a reason why not; asking again won't help.
        """
        clock = clock or SystemClock()
        deadline_s = clock.now_s() + timeout_s
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout_s)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            sock.connect(path)
            sock.setblocking(False)
            _check_owner(sock, path)
        except OSError as error:
            sock.close()
            raise UnavailableError(f"no daemon answers at {path}: {error}") from error
        except RefusedError:
            sock.close()
            raise
        connection = Connection(sock, clock)
        try:
            connection.send(hello)
            connection.welcome = connection._greeted(deadline_s, is_wanted)
        except BaseException:
            connection.close()
            raise
        return connection

    def _greeted(self, deadline_s: float, is_wanted: Callable[[], bool]) -> m.Welcome:
        while True:
            left_s = deadline_s - self._clock.now_s()
            if left_s <= 0 or not is_wanted():
                raise UnavailableError("the daemon does not answer")
            for message in self.receive(min(left_s, LOOK_UP_S)):
                if isinstance(message, m.Welcome):
                    return message

    def lease_s(self, wanted_s: float) -> float:
        """How long a lease may be asked for, up to what is wanted: the daemon has a limit."""
        assert self.welcome is not None
        return min(wanted_s, self.welcome.lease_s_max)

    def next_request_id(self) -> int:
        """A number for a request, unique on this connection."""
        return next(self._request_ids)

    def send(self, message: m.Message) -> None:
        """Send without waiting.

        Raises:
            UnavailableError: The daemon has closed, or does not read.
        """
        self._unsent += codec.encode(message)
        self._flush()
        if len(self._unsent) > UNSENT_BYTES_MAX:
            raise UnavailableError("the daemon does not read")

    def _flush(self) -> None:
        """Give the kernel what it takes."""
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError as error:
            # It may have said why before it closed.
            self._read()
            raise UnavailableError(f"the daemon is gone: {error}") from error
        self._poll.modify(
            self._socket, select.POLLIN | select.POLLOUT if self._unsent else select.POLLIN
        )

    def receive(self, wait_s: float) -> list[m.ToClient]:
        """Messages that have arrived, after waiting up to ``wait_s`` for the first.

        Raises:
            UnavailableError: The connection is over.
            RefusedError: The daemon said why it ends the session.
        """
        if self._unsent:
            self._flush()
        if not self._poll.poll(max(wait_s, 0.0) * 1e3):
            return []
        return self._read()

    def _read(self) -> list[m.ToClient]:
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise UnavailableError(f"the daemon is gone: {error}") from error
        if not data:
            raise UnavailableError("the daemon is gone")
        try:
            messages = [codec.decode_to_client(payload) for payload in self._frames.feed(data)]
        except InputError as error:
            raise UnavailableError(f"the daemon's answer can't be read: {error}") from error
        for message in messages:
            if isinstance(message, m.Refused):
                raise RefusedError(message.reason)
        return messages

    def call(self, message: m.Message, kind: type[Reply], timeout_s: float) -> Reply:
        """Send one request and wait for its answer; answers to earlier ones are dropped.

        Raises:
            UnavailableError: No answer in time. The request may or may not have been carried out.
            RefusedError: The daemon said why it ends the session.
        """
        self.send(message)
        request_id = getattr(message, "request_id")  # noqa: B009 - requests have it, Message has not
        deadline_s = self._clock.now_s() + timeout_s
        while True:
            left_s = deadline_s - self._clock.now_s()
            if left_s <= 0:
                raise UnavailableError(f"no answer within {timeout_s} s")
            for reply in self.receive(left_s):
                if isinstance(reply, kind) and reply.request_id == request_id:
                    return reply

    def is_hung_up(self, wait_s: float) -> bool:
        """Whether the daemon closed or died, after waiting up to ``wait_s`` for that.

        Reads nothing; the one method that another thread may call beside the connection's own.
        """
        watch = select.poll()
        try:
            watch.register(self._socket, select.POLLRDHUP)
        except (OSError, ValueError):  # closed by its own thread meanwhile
            return True
        return bool(watch.poll(wait_s * 1e3))

    def close(self) -> None:
        """End the session; every lease of it ends with it."""
        with contextlib.suppress(OSError):
            self._socket.close()


def _check_owner(sock: socket.socket, path: str) -> None:
    """Trust no daemon of another user: what it lends goes into this engine's answers.

    Raises:
        RefusedError: Somebody else listens there.
    """
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(data)
    if uid not in (0, os.getuid()):
        raise RefusedError(
            f"the daemon at {path} belongs to user {uid}, not to {os.getuid()}: start one of your "
            "own, or choose another socket"
        )
