"""Engines that offer blocks and fetch them, as far as HTTP shows it: a real server, no model."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OFFER = (
    b'{"do_remote_prefill": true, "do_remote_decode":false,"remote_block_ids":[[1, 2,3]],'
    b'"remote_engine_id":"e-1","remote_request_id":"cmpl-1","remote_host":"127.0.0.1",'
    b'"remote_port":5600,"tp_size":1,"big":12345678901234567890123,"odd":1.50}'
)
"""As a prefill engine writes it; how it is written must not change on its way."""
TICKET = b'{"kvkeep": {"ticket": "t-1",  "tokens": 96}}'
WAIT_S = 60.0

Behaviour = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    """Answers as its engine is told."""

    protocol_version = "HTTP/1.1"
    # Head and body in two small packets would wait for each other.
    wbufsize = -1
    disable_nagle_algorithm = True
    server: "OfferingEngine"

    def do_GET(self) -> None:
        """Be well, and say nothing of models."""
        self.answer(200, b"{}")

    def do_POST(self) -> None:
        """Do what the engine is told to."""
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length)
        if len(body) < length:
            return  # whoever sent it left, and no engine takes a part for the whole
        engine = self.server
        with engine.lock:
            engine.bodies.append(body)
            engine.headers.append(dict(self.headers.items()))
            script = engine.scripts.pop(0) if engine.scripts else engine.behaviour
        script(self, json.loads(body))

    def answer(self, status: int, body: bytes) -> None:
        """Write a whole response."""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def is_left(self) -> bool:
        """Wait until the other side closes."""
        self.connection.settimeout(WAIT_S)
        try:
            return not self.connection.recv(1)
        except ConnectionResetError:
            return True

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


class OfferingEngine(ThreadingHTTPServer):
    """One engine; ``scripts`` are done once each, ``behaviour`` afterwards."""

    daemon_threads = False
    block_on_close = True

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.behaviour = behaviour
        self.scripts: list[Behaviour] = []
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.begun = threading.Event()
        """Set by behaviours that stop in the middle."""
        self.left = threading.Event()
        self.go_on = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.name = f"127.0.0.1:{self.server_address[1]}"

    def forget(self) -> None:
        """Begin anew for the next test."""
        with self.lock:
            self.scripts.clear()
            self.bodies.clear()
            self.headers.clear()
        for event in (self.begun, self.left, self.go_on):
            event.clear()

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections end in the middle; that is what is tested."""


def offer(params: bytes) -> Behaviour:
    """A prefill engine that offers blocks."""

    def behave(handler: Handler, body: dict[str, Any]) -> None:
        said = b'{"id":"p","choices":[{"text":"x"}],"kv_transfer_params":' + params
        handler.answer(200, said + b',"usage":{"prompt_tokens":99,"completion_tokens":1}}')

    return behave


def decode(handler: Handler, body: dict[str, Any]) -> None:
    """A decode engine: a stream of two events, or a whole response."""
    if not body.get("stream"):
        handler.answer(200, b'{"id":"d","usage":{"prompt_tokens":7,"completion_tokens":2}}')
        return
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for event in (b'data: {"n": 1}\n\n', b"data: [DONE]\n\n"):
        handler.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))
    handler.wfile.write(b"0\r\n\r\n")
    handler.wfile.flush()


def refuse(status: int, body: bytes = b'{"error":{"message":"no"}}') -> Behaviour:
    """An engine that answers with an error."""

    def behave(handler: Handler, _: dict[str, Any]) -> None:
        handler.answer(status, body)

    return behave


def die(handler: Handler, body: dict[str, Any]) -> None:
    """An engine whose connection breaks before its answer."""
    with contextlib.suppress(OSError):
        handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def freeze(handler: Handler, body: dict[str, Any]) -> None:
    """An engine that says nothing until it is left."""
    handler.server.begun.set()
    if handler.is_left():
        handler.server.left.set()
    handler.close_connection = True


def begin_stream(handler: Handler) -> None:
    """Send the first event of a stream."""
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b'10\r\ndata: {"n": 1}\n\n\r\n')
    handler.wfile.flush()


def stall(handler: Handler, body: dict[str, Any]) -> None:
    """A decode engine that begins a stream and then says nothing until it is left."""
    begin_stream(handler)
    freeze(handler, body)


@contextlib.contextmanager
def offering_engine(behaviour: Behaviour) -> Iterator[OfferingEngine]:
    """An engine that is ended afterwards."""
    engine = OfferingEngine(behaviour)
    thread = threading.Thread(target=engine.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield engine
    finally:
        engine.shutdown()
        thread.join()
        engine.server_close()
