"""A client whose engine starts, with a desk that a test plays."""

from collections.abc import Callable
from typing import Any

import pytest

from kvkeep.router.on_demand.desk import StartRefusal, Waiting
from kvkeep.router.relay.waiting import WaitingForEngine
from kvkeep.router.request import RequestView

Decided = Callable[[StartRefusal | None], None]


class Client:
    """Writes down what becomes of its request."""

    def __init__(self) -> None:
        self.served: object = None
        self.ends: list[str] = []

    def serve(self, served: object) -> None:
        self.served = served

    def relay_request(self, request: object, view: RequestView) -> None:
        self.ends.append(f"relayed {view.model}")

    def refuse(self, status: int, message: str, *, retry_after_s: int) -> None:
        self.ends.append(f"{status} {message} {retry_after_s}")


class Desk:
    """Has whoever comes wait, or sees to them at once."""

    def __init__(self, is_there: bool = False, refusal: StartRefusal | None = None) -> None:
        self.is_there, self.refusal = is_there, refusal
        self.decided: Decided | None = None
        self.num_left = 0

    def wait(self, model: str | None, now_s: float, decided: Decided) -> Waiting | None:
        if self.is_there:
            return None
        if self.refusal is not None:
            decided(self.refusal)
        self.decided = decided
        return Waiting(decided, 1.0)

    def leave(self, waiting: Waiting) -> None:
        self.num_left += 1


def waiting_of(client: Any, desk: Any) -> WaitingForEngine:
    request: Any = None
    return WaitingForEngine(client, desk, request, RequestView("/v1/completions", model="m"))


def test_a_request_goes_on_when_its_engine_is_there() -> None:
    """The connection is busy with it until then, and takes no more of it."""
    client, desk = Client(), Desk()
    waiting = waiting_of(client, desk)

    assert waiting.begin(0.0)
    assert (client.served, waiting.can_take_body, waiting.is_answered) == (waiting, False, False)
    assert desk.decided is not None
    desk.decided(None)
    assert client.ends == ["relayed m"]


def test_nothing_waits_for_an_engine_that_is_there() -> None:
    """The caller relays it, as ever."""
    client = Client()

    assert not waiting_of(client, Desk(is_there=True)).begin(0.0)
    assert client.ends == []


def test_a_refusal_may_come_at_once() -> None:
    """It is the client's answer, and nobody relays the request after it."""
    client = Client()

    assert waiting_of(client, Desk(refusal=StartRefusal(503, "no memory", 9))).begin(0.0)
    assert client.ends == ["503 no memory 9"]


@pytest.mark.parametrize("verdict", [None, StartRefusal(503, "late", 5)])
def test_a_client_that_leaves_is_told_nothing(verdict: StartRefusal | None) -> None:
    """Nor does it keep its place; what is decided later has no one to go to."""
    client, desk = Client(), Desk()
    waiting = waiting_of(client, desk)
    waiting.begin(0.0)
    waiting.client_lost()
    assert desk.decided is not None
    desk.decided(verdict)

    assert client.ends == []
    assert desk.num_left == 1


def test_a_router_that_ends_says_so() -> None:
    """A client that waits is not left without an answer, nor given two."""
    client, desk = Client(), Desk()
    waiting = waiting_of(client, desk)
    waiting.begin(0.0)
    waiting.stop("the router stops")
    waiting.stop("the router stops")

    assert client.ends == ["503 the router stops 1"]
