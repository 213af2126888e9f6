"""Requests that wait before they are relayed: for an engine to start, or for the tokenizer."""

from typing import TYPE_CHECKING

from kvkeep.router.on_demand.desk import StartDesk, StartRefusal, Waiting
from kvkeep.router.relay.reader import Request
from kvkeep.router.request import RequestView

if TYPE_CHECKING:
    from kvkeep.router.relay.server import ClientConnection


class WaitingForEngine:
    """What its client's connection is busy with meanwhile."""

    can_take_body = False
    is_answered = False

    def __init__(
        self, client: "ClientConnection", desk: StartDesk, request: Request, view: RequestView
    ) -> None:
        """Wait for nothing; ``begin`` asks whether there is something to wait for."""
        self._client: ClientConnection | None = client
        self._desk, self._request, self._view = desk, request, view
        self._waiting: Waiting | None = None

    def begin(self, now_s: float) -> bool:
        """Wait, if the engine is not there; returns whether the request has been seen to."""
        client = self._client
        assert client is not None
        client.serve(self)
        self._waiting = self._desk.wait(self._view.model, now_s, self._decided)
        return self._waiting is not None

    def _decided(self, refusal: StartRefusal | None) -> None:
        client, self._client = self._client, None
        if client is None:
            return
        if refusal is None:
            client.relay_request(self._request, self._view)
        else:
            client.refuse(refusal.status, refusal.message, retry_after_s=refusal.retry_after_s)

    def take_body(self, payload: bytes, is_over: bool) -> None:
        """Only whole requests wait."""

    def client_writable(self, is_writable: bool) -> None:
        """Nothing is sent meanwhile."""

    def client_lost(self) -> None:
        """The client left; its engine goes on starting for the next one."""
        self._client = None
        if self._waiting is not None:
            self._desk.leave(self._waiting)

    def look(self, now_s: float, silence_s_max: float) -> None:
        """The desk has the time limits."""

    def stop(self, message: str) -> None:
        """The router ends."""
        client = self._client
        self.client_lost()
        if client is not None:
            client.refuse(503, message, retry_after_s=1)


class WaitingForPrefix:
    """What its client's connection is busy with while a prompt is tokenized."""

    can_take_body = False
    is_answered = False

    def __init__(self, client: "ClientConnection", request: Request, view: RequestView) -> None:
        """Wait for nothing yet."""
        self._client: ClientConnection | None = client
        self._request, self._view = request, view

    def begin(self) -> None:
        """Have the prompt tokenized, and the request relayed then."""
        client = self._client
        assert client is not None
        client.serve(self)
        client.relay.prepare(self._request, self._view, self._prepared)

    def _prepared(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.send_request(self._request, self._view)

    def take_body(self, payload: bytes, is_over: bool) -> None:
        """Only whole requests wait."""

    def client_writable(self, is_writable: bool) -> None:
        """Nothing is sent meanwhile."""

    def client_lost(self) -> None:
        """The client left."""
        self._client = None

    def look(self, now_s: float, silence_s_max: float) -> None:
        """Whoever tokenizes has the time limit."""

    def stop(self, message: str) -> None:
        """The router ends."""
        client, self._client = self._client, None
        if client is not None:
            client.refuse(503, message, retry_after_s=1)
