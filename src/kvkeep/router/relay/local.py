"""What the router answers by itself on the serving port: its health and the models of the fleet."""

import asyncio
import json
from typing import TYPE_CHECKING, Any, Final

import aiohttp

from kvkeep.router.limits.gate import Refusal
from kvkeep.router.relay.errors import response
from kvkeep.router.relay.reader import Request
from kvkeep.router.snapshot import Endpoint, Role

if TYPE_CHECKING:
    from kvkeep.router.relay.relay import Relay
    from kvkeep.router.relay.server import ClientConnection

MODELS_TIMEOUT_S: Final = 5.0
MODELS_BYTES_MAX: Final = 4 << 20
"""Of one endpoint's list."""


class LocalAnswers:
    """``/health`` and ``/v1/models``; everything else that is not relayed is not there."""

    def __init__(self, relay: "Relay") -> None:
        self._relay = relay
        self._session: aiohttp.ClientSession | None = None
        self._listings: dict[bytes | None, asyncio.Task[bytes]] = {}
        """Lists that are being asked for, by ``Authorization``: who asks alike gets the same."""

    def answer(self, client: "ClientConnection", request: Request) -> bool:
        """Answer a request; returns False for one that an engine has to answer."""
        path = request.head.target.partition(b"?")[0]
        if path == b"/health":
            self._answer_health(client)
        elif path == b"/v1/models" and request.head.method in (b"GET", b"HEAD"):
            self._answer_models(client, request)
        elif self._relay.is_relayed(path):
            return False
        else:
            client.refuse(404, f"no {path.decode('ascii')[:200]} here: ask for a path under /v1/")
        return True

    def _answer_health(self, client: "ClientConnection") -> None:
        fleet = self._relay.router.fleet
        ready = sum(len(fleet.ready(role, None)) for role in Role)
        is_well = self._relay.is_ready and not self._relay.is_draining
        state = "draining" if self._relay.is_draining else "ok" if is_well else "no engine is ready"
        body = json.dumps({"status": state, "ready": ready, "endpoints": len(fleet)}).encode()
        keeps = client.keeps
        whole = response(
            200 if is_well else 503, body, is_persistent=keeps, is_for_head=client.is_for_head
        )
        client.answer(whole, keeps=keeps)

    def _answer_models(self, client: "ClientConnection", request: Request) -> None:
        found = self._relay.gate.identify(self._relay.find_authorization(request.head))
        if isinstance(found, Refusal):
            client.refuse(found.status, found.message)
            return
        authorization = request.head.field(b"authorization")
        listing = self._listings.get(authorization)
        if listing is None:
            listing = asyncio.get_running_loop().create_task(self._list_models(authorization))
            self._listings[authorization] = listing
            listing.add_done_callback(lambda _: self._listings.pop(authorization))
        waiting = _WaitingForModels(client)
        client.serve(waiting)
        listing.add_done_callback(waiting.finish)

    async def _list_models(self, authorization: bytes | None) -> bytes:
        """Ask every ready endpoint, and put together what they say; who fails has no models."""
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=MODELS_TIMEOUT_S)
            self._session = aiohttp.ClientSession(timeout=timeout, trust_env=False)
        fleet = self._relay.router.fleet
        endpoints = [endpoint for role in Role for endpoint in fleet.ready(role, None)]
        headers = {"Authorization": authorization.decode("latin-1")} if authorization else {}
        lists = await asyncio.gather(
            *(_models_of(self._session, endpoint, headers) for endpoint in endpoints)
        )
        cards: dict[str, Any] = {}
        for listed in lists:
            for card in listed:
                cards.setdefault(card["id"], card)
        desk = self._relay.desk
        for model in sorted(desk.models) if desk is not None else ():
            cards.setdefault(model, _card(model))
        return json.dumps({"object": "list", "data": list(cards.values())}).encode()

    async def close(self) -> None:
        """Leave nothing open."""
        listings = list(self._listings.values())
        for listing in listings:
            listing.cancel()
        await asyncio.gather(*listings, return_exceptions=True)
        if self._session is not None:
            await self._session.close()


def _card(model: str) -> dict[str, Any]:
    """Of a model whose engine does not run."""
    return {"id": model, "object": "model", "created": 0, "owned_by": "kvkeep"}


class _WaitingForModels:
    """A client that waits for the list of models."""

    can_take_body = False
    is_answered = False

    def __init__(self, client: "ClientConnection") -> None:
        self._client: ClientConnection | None = client

    def finish(self, task: "asyncio.Task[bytes]") -> None:
        """The list is there, or won't be."""
        client, self._client = self._client, None
        if client is None:
            return
        if task.cancelled():
            client.refuse(503, "the router stops", retry_after_s=1)
            return
        keeps = client.keeps
        whole = response(200, task.result(), is_persistent=keeps, is_for_head=client.is_for_head)
        client.answer(whole, keeps=keeps)

    def take_body(self, payload: bytes, is_over: bool) -> None:
        """Nobody wants a body."""

    def client_writable(self, is_writable: bool) -> None:
        """One small response always finds room."""

    def client_lost(self) -> None:
        """The client left; the list is of use to others."""
        self._client = None

    def look(self, now_s: float, silence_s_max: float) -> None:
        """The list has a time limit of its own."""

    def stop(self, message: str) -> None:
        """The router ends."""
        client, self._client = self._client, None
        if client is not None:
            client.refuse(503, message, retry_after_s=1)


async def _models_of(
    session: aiohttp.ClientSession, endpoint: Endpoint, headers: dict[str, str]
) -> list[dict[str, Any]]:
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    url = f"http://{host}:{endpoint.port}/v1/models"
    try:
        async with session.get(url, headers=headers, allow_redirects=False) as answer:
            body = bytearray()
            async for part in answer.content.iter_chunked(1 << 16):
                body += part
                if len(body) > MODELS_BYTES_MAX:
                    return []
            listed = json.loads(body) if answer.status == 200 else None
    except (aiohttp.ClientError, OSError, ValueError, RecursionError):
        return []
    cards = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(cards, list):
        return []
    return [card for card in cards if isinstance(card, dict) and isinstance(card.get("id"), str)]
