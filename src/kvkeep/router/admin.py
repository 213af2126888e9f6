"""The router's own port: health, metrics, who is in the fleet, why a request goes where it goes.

Not for clients, and not on the hot path, so it is a framework's. Whoever reaches it may change the
fleet: it listens on loopback, and anywhere else only with a key. A web page that a person on this
machine visits must not reach it either, so without a key only local names are answered, and nothing
that a browser sends for a page.
"""

import asyncio
import hmac
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from kvkeep.model.errors import InputError, KvkeepError, RefusedError
from kvkeep.model.loopback import is_loopback, names_loopback
from kvkeep.model.private_file import read_secret
from kvkeep.router.cartridges.outcomes import DispatchRefusal
from kvkeep.router.handoff.plan import PlanError
from kvkeep.router.handoff.splice import SpliceError
from kvkeep.router.membership.member import Member
from kvkeep.router.metrics import RouterMetrics
from kvkeep.router.relay.errors import error_object
from kvkeep.router.relay.framing import FramingError, parse_request
from kvkeep.router.relay.reader import Request
from kvkeep.router.request import KEY_HEADERS
from kvkeep.router.router import UnknownModelError

if TYPE_CHECKING:
    from kvkeep.router.run import Parts

BODY_BYTES_MAX = 16 << 20
"""Of a request that is to be explained."""
OPEN_PATHS = frozenset({"/health", "/ready"})
"""What a load balancer may ask without a key: it learns nothing but that."""
_USER = re.compile(r"(?<=://)[^/@\s]+@")
Known = TypeVar("Known", bound=msgspec.Struct)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Drain(msgspec.Struct, forbid_unknown_fields=True):
    """What ``PATCH /workers/NAME`` takes."""

    drain: bool


def find_key(host: str, key_file: str) -> bytes | None:
    """The admin key; None where none is needed.

    Raises:
        InputError: Others can reach this address and there is no key, or the file is wrong.
    """
    if key_file:
        return read_secret(Path(key_file), "admin key file")
    if not is_loopback(host):
        raise InputError(
            f"admin_host {host} lets other machines in: name a key with admin_key_file, "
            "or listen on 127.0.0.1"
        )
    return None


def make_application(parts: "Parts", metrics: RouterMetrics, key: bytes | None) -> web.Application:
    """The pages of one router."""
    pages = _Pages(parts, metrics)
    application = web.Application(
        client_max_size=BODY_BYTES_MAX, middlewares=[_guard(key), _errors]
    )
    application.add_routes(
        [
            web.get("/health", pages.health),
            web.get("/ready", pages.ready),
            web.get("/metrics", pages.prometheus),
            web.get("/config", pages.config),
            web.get("/workers", pages.workers),
            web.post("/workers", pages.join),
            web.delete("/workers/{name}", pages.leave),
            web.patch("/workers/{name}", pages.drain),
            web.post("/explain", pages.explain),
        ]
    )
    return application


class _Pages:
    def __init__(self, parts: "Parts", metrics: RouterMetrics) -> None:
        self._parts, self._metrics = parts, metrics
        self._registry = CollectorRegistry()
        self._registry.register(metrics)

    async def health(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def ready(self, _request: web.Request) -> web.Response:
        ready, is_draining = self._metrics.num_ready, self._parts.relay.is_draining
        is_well = self._parts.relay.is_ready and not is_draining
        said = "draining" if is_draining else "ok" if is_well else "no engine is ready"
        return web.json_response({"status": said, "ready": ready}, status=200 if is_well else 503)

    async def prometheus(self, _request: web.Request) -> web.Response:
        text = generate_latest(self._registry)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def config(self, _request: web.Request) -> web.Response:
        """Settings as they count. Keys lie in files, of which only the paths are settings."""
        text = msgspec.json.encode(self._parts.settings).decode()
        return web.Response(text=_USER.sub("***@", text), content_type="application/json")

    async def workers(self, _request: web.Request) -> web.Response:
        return web.json_response(self._metrics.workers())

    async def join(self, request: web.Request) -> web.Response:
        parts = self._parts
        member = _decode(await request.read(), Member)
        is_new = parts.roster.add(member, parts.clock.now_s())
        endpoint = parts.fleet.find(member.title)
        assert endpoint is not None
        return web.json_response(self._metrics.worker(endpoint), status=201 if is_new else 200)

    async def leave(self, request: web.Request) -> web.Response:
        """Twice is once: what is not there has left."""
        parts, name = self._parts, request.match_info["name"]
        parts.roster.remove(name, parts.clock.now_s())
        endpoint = parts.fleet.find(name)
        state = "gone" if endpoint is None else endpoint.state.value
        return web.json_response(
            {"name": name, "state": state}, status=200 if endpoint is None else 202
        )

    async def drain(self, request: web.Request) -> web.Response:
        parts, name = self._parts, request.match_info["name"]
        wanted = _decode(await request.read(), Drain)
        endpoint = parts.fleet.find(name)
        if endpoint is None:
            return _error(404, f"there is no endpoint {name}: see GET /workers")
        parts.roster.drain(name, is_draining=wanted.drain)
        return web.json_response(self._metrics.worker(endpoint))

    async def explain(self, request: web.Request) -> web.Response:
        """Choose for a request as if it had come to the serving port; nothing is sent."""
        parts = self._parts
        body = await request.read()
        path = request.query.get("path", "/v1/chat/completions")
        head = f"POST {path} HTTP/1.1\r\nHost: explain\r\nContent-Length: {len(body)}\r\n"
        cartridges = parts.cartridges
        names = [name.decode() for name in KEY_HEADERS]
        for name in names + ([] if cartridges is None else cartridges.headers):
            value = request.headers.get(name)
            head += "" if value is None else f"{name}: {value}\r\n"
        try:
            asked = Request(parse_request(f"{head}\r\n".encode()), body, is_whole=True)
            view = parts.relay.view_of(asked)
            if cartridges is not None:
                asked = cartridges.explain(asked, view)
            prepared = asyncio.get_running_loop().create_future()
            parts.relay.prepare(asked, view, lambda: prepared.set_result(None))
            await prepared
            choice = parts.router.route(view, parts.clock.now_s(), explain=True)
            handed = None if parts.handoffs is None else parts.handoffs.explain(asked, view)
        except (PlanError, SpliceError) as error:
            return _error(400, str(error))
        except FramingError as error:
            return _error(400, error.message)
        except DispatchRefusal as error:
            return _error(error.status, error.message)
        except UnknownModelError as error:
            return _error(404, f"no engine serves the model {str(error)!r}: see /v1/models")
        return web.json_response(
            {
                "endpoint": None if choice.endpoint is None else choice.endpoint.name,
                "policy": parts.router.policy.name,
                "reason": choice.reason,
                "handoff": handed,
                "cartridge": view.cartridge,
                "model": view.model,
                "key": None if view.key is None else view.key.decode(errors="replace"),
                "num_tokens": view.num_tokens,
                "num_blocks": None if view.prefix is None else len(view.prefix),
                "considered": [
                    {"name": name, "score": score, "why": why}
                    for name, score, why in choice.considered
                ],
            }
        )


def _guard(key: bytes | None) -> Any:
    """Let in who shows the key; without one, who is on this machine and is no web page."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if key is not None:
            if request.path in OPEN_PATHS or _shows(request, key):
                return await handler(request)
            response = _error(401, "send the admin key as 'Authorization: Bearer KEY'")
            response.headers["WWW-Authenticate"] = "Bearer"
            return response
        if not names_loopback(request.host) or "Origin" in request.headers:
            return _error(403, "ask for 127.0.0.1 by that name, and not from a web page")
        return await handler(request)

    return guard


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Say what is wrong in the form in which the serving port says it."""
    try:
        return await handler(request)
    except InputError as error:
        return _error(400, str(error))
    except RefusedError as error:
        return _error(409, str(error))
    except KvkeepError as error:
        return _error(503, str(error))
    except web.HTTPException as error:
        if error.status < 400:
            raise
        response = _error(error.status, f"{request.method} {request.path}: {error.reason}")
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response


def _shows(request: web.Request, key: bytes) -> bool:
    shown = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
    return hmac.compare_digest(shown, b"Bearer " + key)


def _decode(body: bytes, kind: type[Known]) -> Known:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InputError(f"the body is not what is expected here: {error}") from error


def _error(status: int, message: str) -> web.Response:
    return web.json_response(error_object(status, message), status=status)
