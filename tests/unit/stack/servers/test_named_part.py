"""A named server: its program is found, and it is ready when its entry says."""

import http.server
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvkeep.model.errors import InputError
from kvkeep.stack.servers.named import ServerSpec
from kvkeep.stack.servers.named_part import NamedServerPart, answers, find_command

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


class Page(http.server.BaseHTTPRequestHandler):
    """A server with one page."""

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(200 if self.path == "/health" else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@contextmanager
def listening() -> Iterator[int]:
    with http.server.HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("ready", "is_ready"), [("", True), ("p", True), ("p/health", True), ("p/other", False)]
)
def test_a_server_is_ready_when_its_entry_says(ready: str, is_ready: bool) -> None:
    """At once, when its port takes connections, or when a page answers."""
    with listening() as port:
        server = ServerSpec(name="s", command=["x"], ports={"p": port}, ready=ready)
        assert answers(server) is is_ready


@pytest.mark.parametrize("ready", ["p", "p/health"])
def test_a_server_that_does_not_listen_is_not_ready(ready: str) -> None:
    """Nobody listens any more."""
    with listening() as port:
        pass
    assert not answers(ServerSpec(name="s", command=["x"], ports={"p": port}, ready=ready))


def test_a_program_is_found_by_its_path(tmp_path: Path) -> None:
    """Or refused with what to do, before anything is started."""
    program = tmp_path / "cached"
    program.write_text("")
    server = ServerSpec(name="s", command=[str(program), "--x"])

    with pytest.raises(InputError, match="there is no program"):
        find_command(server)
    program.chmod(stat.S_IRWXU)
    assert find_command(server) == [str(program), "--x"]
    with pytest.raises(InputError, match=r"servers\.s\.command: there is no program no-such"):
        find_command(ServerSpec(name="s", command=["no-such-program"]))


def test_a_server_is_kept_on_loopback_unless_told(tmp_path: Path) -> None:
    """Its own variables win over those that see to it."""

    def environment(**env: str) -> dict[str, str]:
        server = ServerSpec(name="s", command=[sys.executable], env=env)
        part = NamedServerPart(
            server,
            tmp_path,
            start_timeout_s=1.0,
            changed=lambda: None,
            let_go=lambda port: None,
        )
        return part.how.launch.environment

    assert environment()["KVKEEP_LISTENING_ADDRESS"] == "127.0.0.1"
    assert "_one_address" in environment()["LD_PRELOAD"]
    assert environment(LD_PRELOAD="")["LD_PRELOAD"] == ""
