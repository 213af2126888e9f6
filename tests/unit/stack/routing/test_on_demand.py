"""The supervisor's side of engines on demand, with engines that a test moves by hand."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.router.on_demand.starter import EngineOrder, StartNews
from kvkeep.stack.routing.on_demand import CONNECTIONS_MAX, OnDemandEngines


class HandEngine:
    """An engine that starts, stops and ends when a test says so."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_begun = self.num_stop_asked = 0
        self.is_up = self.is_left = False
        self.error = ""

    def doing(self) -> str:
        return "loading libraries"

    def begin_again(self) -> None:
        self.num_begun += 1
        self.is_left = True

    def is_restarted(self) -> bool:
        if self.error:
            raise UnavailableError(self.error)
        return self.is_up

    def ask_stop(self) -> None:
        self.num_stop_asked += 1

    def is_gone(self) -> bool:
        return not self.is_left

    def is_running(self) -> bool:
        return self.is_left

    def why_failed(self) -> str:
        return "it was killed"

    def stop(self) -> None:
        self.is_left = False


class Scene:
    """Two engines, and a router that a test plays."""

    def __init__(self, path: Path) -> None:
        self.parts = [HandEngine("a"), HandEngine("b")]
        parts: Any = self.parts
        self.engines = OnDemandEngines(str(path), parts)
        self.path = path

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(self.path))
        sock.setblocking(False)
        return sock

    def order(self, sock: socket.socket, name: str, is_wanted: bool) -> None:
        sock.send(msgspec.json.encode(EngineOrder(name, is_wanted)) + b"\n")
        self.engines.look(0.0)

    def news(self, sock: socket.socket) -> list[StartNews]:
        """What was said since the last time."""
        self.engines.look(0.0)
        try:
            lines = sock.recv(1 << 16).splitlines()
        except BlockingIOError:
            return []
        return [msgspec.json.decode(line, type=StartNews) for line in lines]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    found = Scene(tmp_path / "s")
    yield found
    found.engines.close()
    assert not found.path.exists()


def states(news: list[StartNews]) -> list[tuple[str, str]]:
    return [(each.engine, each.state) for each in news]


def test_an_engine_starts_and_stops_as_ordered(scene: Scene) -> None:
    """Each change is told once, and what was ordered already changes nothing."""
    part = scene.parts[0]
    with scene.connect() as sock:
        assert states(scene.news(sock)) == [("a", "stopped"), ("b", "stopped")]
        scene.order(sock, "a", True)
        scene.order(sock, "a", True)
        assert states(scene.news(sock)) == [("a", "starting")]
        part.is_up = True
        assert states(scene.news(sock)) == [("a", "ready")]
        assert scene.news(sock) == []
        scene.order(sock, "a", False)
        scene.order(sock, "a", False)
        assert scene.news(sock) == []
        part.is_left = False
        assert states(scene.news(sock)) == [("a", "stopped")]

    assert (part.num_begun, part.num_stop_asked) == (1, 2)
    assert scene.parts[1].num_begun == 0


def test_a_start_that_fails_and_an_end_are_told_with_their_reason(scene: Scene) -> None:
    """The router decides what follows from it."""
    part = scene.parts[0]
    with scene.connect() as sock:
        scene.order(sock, "a", True)
        scene.news(sock)
        part.error = "no memory"
        failed = scene.news(sock)
        part.error, part.is_up = "", True
        scene.order(sock, "a", True)
        scene.news(sock)
        part.is_left = False
        ended = scene.news(sock)

    assert failed == [StartNews("a", "failed", "no memory")]
    assert ended == [StartNews("a", "stopped", "it was killed")]
    assert part.num_begun == 2


def test_an_engine_that_is_wanted_again_while_it_stops_starts_after_it(scene: Scene) -> None:
    """Two processes of one engine would fight for its port."""
    part = scene.parts[0]
    part.is_up = True
    with scene.connect() as sock:
        scene.order(sock, "a", True)
        scene.news(sock)
        scene.order(sock, "a", False)
        scene.order(sock, "a", True)
        before = part.num_begun
        part.is_left = False
        told = scene.news(sock)

    assert (before, part.num_begun) == (1, 2)
    assert states(told) == [("a", "starting")]


def test_a_router_that_comes_later_is_told_what_runs(scene: Scene) -> None:
    """It was restarted, and need not start anything for it."""
    scene.parts[0].is_up = True
    with scene.connect() as sock:
        scene.order(sock, "a", True)
        scene.news(sock)
    with scene.connect() as later:
        told = scene.news(later)

    assert states(told) == [("a", "ready"), ("b", "stopped")]


@pytest.mark.parametrize(
    "said", [b"nonsense\n", b'{"engine":"a"}\n', b'{"engine":"a","is_wanted":1}\n', b"x" * 70_000]
)
def test_what_is_no_order_ends_the_connection(scene: Scene, said: bytes) -> None:
    """Nothing is started for it, and others are served."""
    with scene.connect() as sock, scene.connect() as other:
        scene.news(sock)
        scene.news(other)
        sock.send(said)
        for _ in range(3):  # it is read in pieces
            scene.engines.look(0.0)
        assert sock.recv(10) == b""
        scene.order(other, "b", True)

    assert [part.num_begun for part in scene.parts] == [0, 1]


def test_an_order_may_come_in_pieces(scene: Scene) -> None:
    """Nothing is done for half a line, nor for an engine that is not known."""
    with scene.connect() as sock:
        sock.send(b'{"engine":"x","is_wanted":true}\n{"engine":"a",')
        scene.engines.look(0.0)
        scene.engines.look(0.0)
        before = scene.parts[0].num_begun
        sock.send(b'"is_wanted":true}\n')
        scene.engines.look(0.0)

    assert (before, scene.parts[0].num_begun) == (0, 1)


def test_connections_are_bounded(scene: Scene) -> None:
    """Who comes last is served; whoever left connections behind loses the oldest."""
    socks = [scene.connect() for _ in range(CONNECTIONS_MAX + 1)]
    for _ in socks:
        scene.engines.look(0.0)
    scene.order(socks[-1], "a", True)
    first = socks[0].recv(1 << 16)
    first += socks[0].recv(1 << 16)  # the end of the connection: no error, and no more bytes
    for sock in socks:
        sock.close()

    assert first.count(b"\n") == 2
    assert scene.parts[0].num_begun == 1


def test_the_socket_is_the_user_s_alone(scene: Scene) -> None:
    """Others could start and stop engines."""
    assert scene.path.stat().st_mode & 0o777 == 0o600


def test_a_place_where_nobody_can_listen_is_one_sentence(tmp_path: Path) -> None:
    """It names what to choose."""
    with pytest.raises(InputError, match="choose another state_dir"):
        OnDemandEngines(str(tmp_path / "none" / "s"), [])
