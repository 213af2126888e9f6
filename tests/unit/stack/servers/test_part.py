"""Whether a started server answers."""

import http.server
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvkeep.stack.engines import Launch
from kvkeep.stack.servers.launch import ServerLaunch
from kvkeep.stack.servers.part import answers_mooncake, answers_valkey, keeps_objects
from kvkeep.stack.servers.started import StartedServer

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
NOTHING = Launch(command=[], environment={})


@contextmanager
def listening(handler: type[socketserver.BaseRequestHandler]) -> Iterator[int]:
    """A server on a free port."""
    with socketserver.TCPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def valkey(*answers: bytes) -> type[socketserver.BaseRequestHandler]:
    """A server that says these things at once."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(100)
            self.request.sendall(b"".join(answers))

    return Handler


class Loading(http.server.BaseHTTPRequestHandler):
    """A server that says 503 to everything."""

    def do_GET(self) -> None:
        """Answer."""
        self.send_error(503)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.mark.parametrize(
    ("answers", "is_ready"),
    [
        ((b"+OK\r\n", b"+PONG\r\n"), True),
        ((b"+OK\r\n", b"-LOADING\r\n"), False),
        ((b"-WRONGPASS\r\n", b"-NOAUTH\r\n"), False),
        ((), False),
    ],
)
def test_valkey_is_ready_when_it_answers_its_user(
    answers: tuple[bytes, ...], is_ready: bool
) -> None:
    """Another program on the port, or a server that loads, is not."""
    with listening(valkey(*answers)) as port:
        how = ServerLaunch(NOTHING, password="secret")

        assert answers_valkey(StartedServer("valkey", port, 1, 0), how) is is_ready


def test_a_server_that_only_listens_is_not_ready() -> None:
    """It has to say that it is well."""
    with listening(Loading) as port:
        how = ServerLaunch(NOTHING, ports={"filer.port": port, "metrics": port})

        assert not keeps_objects(StartedServer("object_store", port, 1, 0), how)
        assert not answers_mooncake(StartedServer("mooncake", port, 1, 0), how)


def test_a_port_where_nobody_listens_is_not_ready() -> None:
    """A refused connection is an answer, not an error."""
    with listening(Loading) as port:
        pass
    how = ServerLaunch(NOTHING, ports={"filer.port": port, "metrics": port}, password="x")
    for is_ready in (answers_valkey, keeps_objects, answers_mooncake):
        assert not is_ready(StartedServer("any", port, 1, 0), how)
