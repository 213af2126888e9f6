"""The supervisor's side of engines on demand: the router's orders, and the news it is told.

One listening socket, looked at by the thread that watches the stack: nothing here waits for an
engine. On each connection every engine's state is told first, then each change; an order that was
given before changes nothing. `kvkeep.router.on_demand.supervised` is the other side.
"""

import contextlib
import os
import select
import socket
from collections.abc import Sequence

import msgspec

from kvkeep.model.errors import InputError, KvkeepError
from kvkeep.router.on_demand.starter import EngineOrder, StartNews
from kvkeep.stack.parts import EnginePart

LOOK_S = 0.1
"""Between two looks at an engine that starts or stops."""
CONNECTIONS_MAX = 8
LINE_BYTES_MAX = 1 << 16
RECEIVED_BYTES = 1 << 16

_order = msgspec.json.Decoder(EngineOrder)


class OnDemandEngine:
    """One engine of the stack that runs only while the router wants it."""

    def __init__(self, part: EnginePart) -> None:
        """Take an engine that was not started."""
        self.part = part
        self.news = StartNews(part.name, "stopped")
        self._is_stopping = False
        self._is_wanted = False

    @property
    def is_changing(self) -> bool:
        """Whether it starts or stops just now."""
        return self._is_stopping or self.news.state == "starting"

    def order(self, is_wanted: bool) -> None:
        """Begin what the router wants; it may be so already."""
        self._is_wanted = is_wanted
        runs = self.news.state in ("starting", "ready")
        if is_wanted and not runs and not self._is_stopping:
            self._begin()
        elif not is_wanted and runs:
            self.part.ask_stop()
            self._is_stopping = True

    def _begin(self) -> None:
        self.news = StartNews(self.part.name, "starting", self.part.doing())
        try:
            self.part.begin_again()
        except (KvkeepError, OSError) as error:
            self.news = StartNews(self.part.name, "failed", str(error))

    def look(self) -> None:
        """See how far it is; quick."""
        if self._is_stopping:
            self._look_at_stop()
        elif self.news.state == "starting":
            self._look_at_start()
        elif self.news.state == "ready" and not self.part.is_running():
            why = self.part.why_failed()
            self.part.stop()
            self.news = StartNews(self.part.name, "stopped", why)

    def _look_at_stop(self) -> None:
        if not self.part.is_gone():
            return
        self.part.stop()
        self._is_stopping = False
        self.news = StartNews(self.part.name, "stopped")
        if self._is_wanted:
            self._begin()

    def _look_at_start(self) -> None:
        try:
            is_ready = self.part.is_restarted()
        except (KvkeepError, OSError) as error:
            self.part.stop()
            self.news = StartNews(self.part.name, "failed", str(error))
            return
        if is_ready:
            self.news = StartNews(self.part.name, "ready")
        else:
            self.news = StartNews(self.part.name, "starting", self.part.doing())


class _Connection:
    """One router that listens, and what has come of its next order."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = b""

    def tell(self, news: Sequence[StartNews]) -> bool:
        """Send news; False if nobody takes them."""
        text = b"".join(msgspec.json.encode(each) + b"\n" for each in news)
        try:
            return not text or self.sock.send(text) == len(text)
        except OSError:
            return False

    def receive(self) -> list[EngineOrder] | None:
        """Orders that came; None at the end of the connection, or if these are none."""
        try:
            data = self.sock.recv(RECEIVED_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *lines, self.received = (self.received + data).split(b"\n")
        if not data or len(self.received) > LINE_BYTES_MAX:
            return None
        try:
            return [_order.decode(line) for line in lines]
        except msgspec.DecodeError:
            return None


class OnDemandEngines:
    """All engines on demand of a stack."""

    def __init__(self, path: str, parts: Sequence[EnginePart]) -> None:
        """Listen at a path; whoever may write there may start engines: the user, and root.

        Raises:
            InputError: Nothing can listen there.
        """
        self._engines = {part.name: OnDemandEngine(part) for part in parts}
        self._connections: list[_Connection] = []
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # the folder's lock is ours, so it is a dead supervisor's
            self._listener.bind(path)
        except OSError as error:
            self._listener.close()
            raise InputError(
                f"{path}: the router can't ask for engines there ({error.strerror}); "
                "choose another state_dir."
            ) from error
        finally:
            os.umask(before)
        self._listener.listen(CONNECTIONS_MAX)
        self._listener.setblocking(False)

    @property
    def names(self) -> frozenset[str]:
        """Of these engines."""
        return frozenset(self._engines)

    def look(self, wait_s: float) -> None:
        """Hear orders for at most ``wait_s`` seconds, and tell what has changed."""
        if any(engine.is_changing for engine in self._engines.values()):
            wait_s = min(wait_s, LOOK_S)
        sockets = [self._listener, *(each.sock for each in self._connections)]
        ready, _, _ = select.select(sockets, [], [], wait_s)
        before = [engine.news for engine in self._engines.values()]
        if self._listener in ready:
            self._accept()
        for connection in [each for each in self._connections if each.sock in ready]:
            self._hear(connection)
        for engine in self._engines.values():
            engine.look()
        after = [engine.news for engine in self._engines.values()]
        changed = [news for news, old in zip(after, before, strict=True) if news != old]
        for connection in list(self._connections):
            if not connection.tell(changed):
                self._forget(connection)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        if len(self._connections) >= CONNECTIONS_MAX:
            self._forget(self._connections[0])
        connection = _Connection(sock)
        self._connections.append(connection)
        if not connection.tell([engine.news for engine in self._engines.values()]):
            self._forget(connection)

    def _hear(self, connection: _Connection) -> None:
        orders = connection.receive()
        if orders is None:
            self._forget(connection)
            return
        for order in orders:
            engine = self._engines.get(order.engine)
            if engine is not None:
                engine.order(order.is_wanted)

    def _forget(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
            connection.sock.close()

    def close(self) -> None:
        """Listen no more; engines that run are the stack's to stop. Idempotent."""
        for connection in list(self._connections):
            self._forget(connection)
        self._listener.close()
        with contextlib.suppress(OSError):
            os.unlink(self.path)
