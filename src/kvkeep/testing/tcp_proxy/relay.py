"""Passes TCP connections on to a server, and lets them fail at a byte that a test chose."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from enum import Enum
from random import Random
from types import TracebackType
from typing import Final

PIECE_BYTES: Final = 1 << 16
SLOW_STEPS_PER_S: Final = 100
"""A slow network passes bytes so many times a second."""
JOIN_TIMEOUT_S: Final = 5.0


class NetworkFault(Enum):
    """What can go wrong on the way; the value is its name in logs and documents."""

    HEALTHY = "healthy"
    CUT = "network cut"
    """Connections end, for both sides, at the chosen byte; new ones too, at their first."""
    FROZEN = "network frozen"
    """Connections stay, and nothing passes."""
    SLOW = "network slow"
    BIT_FLIP = "bit flipped on the way"
    """Once, in the chosen byte; the seed chooses the bit."""
    REFUSED = "connections refused"
    """All that there are end, and new ones end at once."""


class Towards(Enum):
    """Where bytes go."""

    CLIENT = "client"
    SERVER = "server"


class _CutError(OSError):
    """This connection ends here."""


class FaultyRelay:
    """A relay on a loopback port of its own; a context manager. Thread-safe.

    One fault holds at a time, in one direction, for all connections together, until the next
    ``strike`` or ``heal``.
    """

    def __init__(self, target: tuple[str, int], seed: int = 0) -> None:
        self._target = target
        self._chance = Random(seed)
        self._changed = threading.Condition()
        self._fault = NetworkFault.HEALTHY
        self._towards = Towards.CLIENT
        self._bytes_before = 0
        self._bytes_per_s = 0.0
        self._struck = threading.Event()
        self._is_closed = False
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.num_bytes = dict.fromkeys(Towards, 0)
        """Passed on so far."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        """Host and port for clients."""
        self._start(self._accept)

    def __enter__(self) -> "FaultyRelay":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    # --- What a test says ------------------------------------------------------------------------

    def strike(
        self,
        fault: NetworkFault,
        *,
        towards: Towards = Towards.CLIENT,
        after_bytes: int = 0,
        bytes_per_s: float = 0.0,
    ) -> threading.Event:
        """Let this fault hold from now on.

        Args:
            fault: Which.
            towards: The direction it is in.
            after_bytes: How many bytes still pass in that direction before.
            bytes_per_s: The speed of a slow network.

        Returns:
            An event that is set when a byte has met the fault.
        """
        if fault is NetworkFault.SLOW and bytes_per_s <= 0:
            raise ValueError("a slow network needs bytes_per_s")
        with self._changed:
            self._fault, self._towards = fault, towards
            self._bytes_before, self._bytes_per_s = after_bytes, bytes_per_s
            self._struck = threading.Event()
            if fault is NetworkFault.REFUSED:
                self._hang_up()
            self._changed.notify_all()
            return self._struck

    def heal(self) -> None:
        """Let everything pass again."""
        self.strike(NetworkFault.HEALTHY)

    def close(self) -> None:
        """End all connections and threads."""
        with self._changed:
            self._is_closed = True
            self._hang_up()
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes who accepts
        for thread in list(self._threads):
            thread.join(JOIN_TIMEOUT_S)
        self._listener.close()

    def _hang_up(self) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes who receives or sends

    # --- Threads ---------------------------------------------------------------------------------

    def _start(self, work: object, *args: object) -> None:
        thread = threading.Thread(target=work, args=args, name="faulty-relay")  # type: ignore[arg-type]
        self._threads = [other for other in self._threads if other.is_alive()]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._changed:
                if self._is_closed:
                    client.close()
                    return
                is_refused = self._fault is NetworkFault.REFUSED
                if is_refused:
                    self._struck.set()
            if is_refused or not self._join(client):
                client.close()

    def _join(self, client: socket.socket) -> bool:
        try:
            server = socket.create_connection(self._target, timeout=JOIN_TIMEOUT_S)
        except OSError:
            return False
        server.settimeout(None)
        for sock in (client, server):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ends_left = threading.Semaphore(1)
        with self._changed:
            self._sockets |= {client, server}
            self._start(self._pump, client, server, Towards.SERVER, ends_left)
            self._start(self._pump, server, client, Towards.CLIENT, ends_left)
            if self._is_closed:
                self._hang_up()
        return True

    def _pump(
        self,
        source: socket.socket,
        target: socket.socket,
        towards: Towards,
        ends_left: threading.Semaphore,
    ) -> None:
        try:
            while data := source.recv(PIECE_BYTES):
                for piece in self._let_through(data, towards):
                    target.sendall(piece)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            for sock in (source, target):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        if not ends_left.acquire(blocking=False):
            with self._changed:
                self._sockets -= {source, target}
            source.close()
            target.close()

    def _let_through(self, data: bytes, towards: Towards) -> Iterator[bytes]:
        """Give out what may pass now; waits where nothing may.

        Raises:
            _CutError: Nothing more will.
        """
        rest = data
        while rest:
            piece, pause_s = self._next_piece(rest, towards)
            rest = rest[len(piece) :]
            if piece:
                self.num_bytes[towards] += len(piece)
                yield piece
            with self._changed:
                if pause_s != 0 and not self._is_closed:
                    self._changed.wait(pause_s)

    def _next_piece(self, rest: bytes, towards: Towards) -> tuple[bytes, float | None]:
        """Return what may pass, and how long to wait then; None is until something changes."""
        with self._changed:
            if self._is_closed:
                raise _CutError
            if self._fault is NetworkFault.HEALTHY or self._towards is not towards:
                return rest, 0
            if self._bytes_before > 0:
                piece = rest[: self._bytes_before]
                self._bytes_before -= len(piece)
                return piece, 0
            self._struck.set()
            if self._fault in (NetworkFault.CUT, NetworkFault.REFUSED):
                raise _CutError
            if self._fault is NetworkFault.FROZEN:
                return b"", None
            if self._fault is NetworkFault.BIT_FLIP:
                self._fault = NetworkFault.HEALTHY
                return bytes([rest[0] ^ 1 << self._chance.randrange(8)]), 0
            step = max(1, int(self._bytes_per_s / SLOW_STEPS_PER_S))
            return rest[:step], len(rest[:step]) / self._bytes_per_s
