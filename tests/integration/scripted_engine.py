"""An engine that does what a request's header ``X-Script`` says, byte by byte."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

OK = b"HTTP/1.1 200 OK\r\n"
EVENT = b'data: {"n": 1}\n\n'
EVENT_CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
STREAM = OK + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
LARGE_BYTES = 32 << 20
SOCKET_TIMEOUT_S = 60.0


class ScriptedEngine:
    """A server of blocking sockets, one thread for each connection."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests: list[bytes] = []
        """Heads and bodies, as they came; probes are left out."""
        self.left = threading.Event()
        """Set when a connection ended while its request was worked on."""
        self.sent_bytes = 0
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(SOCKET_TIMEOUT_S)
            self._sockets.append(sock)
            thread = threading.Thread(target=self._serve, args=(sock,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            data = b""
            while True:
                while b"\r\n\r\n" not in data:
                    piece = sock.recv(1 << 16)
                    if not piece:
                        return
                    data += piece
                head, _, data = data.partition(b"\r\n\r\n")
                script = _field(head, b"x-script") or b"ok"
                if head.startswith(b"GET "):  # whoever asks how the engine is, or what it serves
                    sock.sendall(OK + b"content-length: 0\r\n\r\n")
                    continue
                length = int(_field(head, b"content-length") or b"0")
                while len(data) < length and script != b"early":
                    data += sock.recv(1 << 16)
                body, data = data[:length], data[length:]
                self.requests.append(head + b"\r\n\r\n" + body)
                if not SCRIPTS[script](self, sock, body):
                    return

    def close(self) -> None:
        """End every connection and thread."""
        with contextlib.suppress(OSError):  # it is closed already
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()


def _field(head: bytes, name: bytes) -> bytes | None:
    for line in head.split(b"\r\n")[1:]:
        found, _, value = line.partition(b":")
        if found.lower() == name:
            return value.strip()
    return None


Script = Callable[[ScriptedEngine, socket.socket, bytes], bool]
"""Answers; returns whether the connection goes on."""


def _echo(engine: ScriptedEngine, sock: socket.socket, body: bytes) -> bool:
    sock.sendall(OK + b"content-length: %d\r\n\r\n" % len(body) + body)
    return True


def _stream(engine: ScriptedEngine, sock: socket.socket, body: bytes) -> bool:
    sock.sendall(STREAM + EVENT_CHUNK)
    # The second event goes out when the client has shown that it has the first.
    engine.left.wait(SOCKET_TIMEOUT_S)
    engine.left.clear()
    sock.sendall(EVENT_CHUNK + b"0\r\n\r\n")
    return True


def _cut(engine: ScriptedEngine, sock: socket.socket, body: bytes) -> bool:
    sock.sendall(STREAM + EVENT_CHUNK)
    return False


def _short(engine: ScriptedEngine, sock: socket.socket, body: bytes) -> bool:
    sock.sendall(OK + b"content-length: 100\r\n\r\n" + b"x" * 10)
    return False


def _never(engine: ScriptedEngine, sock: socket.socket, body: bytes) -> bool:
    # The router ends this, when its client leaves.
    with contextlib.suppress(ConnectionResetError):
        assert not sock.recv(1)
    engine.left.set()
    return False


def _endless(engine: ScriptedEngine, sock: socket.socket, body: bytes) -> bool:
    sock.sendall(STREAM)
    try:
        while True:
            sock.sendall(EVENT_CHUNK)
    except OSError:
        engine.left.set()
    return False


def _large(engine: ScriptedEngine, sock: socket.socket, body: bytes) -> bool:
    engine.sent_bytes = 0
    sock.sendall(OK + b"content-length: %d\r\n\r\n" % LARGE_BYTES)
    for _ in range(LARGE_BYTES >> 16):
        sock.sendall(b"x" * (1 << 16))
        engine.sent_bytes += 1 << 16
    return True


def _early(engine: ScriptedEngine, sock: socket.socket, body: bytes) -> bool:
    sock.sendall(
        b"HTTP/1.1 413 Too Large\r\nconnection: close\r\ncontent-length: 9\r\n\r\ntoo large"
    )
    with contextlib.suppress(OSError):
        while sock.recv(1 << 16):
            pass
    return False


SCRIPTS: dict[bytes, Script] = {
    b"ok": _echo,
    b"stream": _stream,
    b"cut": _cut,
    b"short": _short,
    b"never": _never,
    b"endless": _endless,
    b"large": _large,
    b"early": _early,
}


@contextlib.contextmanager
def scripted_engine() -> Iterator[ScriptedEngine]:
    """An engine that is ended afterwards."""
    engine = ScriptedEngine()
    try:
        yield engine
    finally:
        engine.close()
