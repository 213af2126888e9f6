"""What a client can ask about sequences over HTTP, and what it is told when it can't be done."""

import asyncio
import contextlib
import hmac
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware

from kvkeep.core.sequences import LayerKv, MissingError, SequenceTable, StoredSequence
from kvkeep.daemon.sequences.bodies import Transfers, digest_of, lay_out, receive
from kvkeep.daemon.sequences.figures import SequenceFigures
from kvkeep.daemon.sequences.settings import SequenceSettings
from kvkeep.model.errors import CapacityError, CorruptDataError, InputError, RefusedError
from kvkeep.model.loopback import names_loopback
from kvkeep.protocol.sequence_body import DIGEST_HEADER, check_name, parse_layers

log = logging.getLogger(__name__)

ONE = "/v1/sequences/{name}"
CONTENT_TYPE = "application/octet-stream"
_LENGTH = re.compile(r"[0-9]{1,15}")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Pages:
    """The requests about one daemon's sequences."""

    def __init__(
        self, settings: SequenceSettings, table: SequenceTable, figures: SequenceFigures
    ) -> None:
        self._settings = settings
        self._table = table
        self._figures = figures
        self._num_evicted = 0
        """As far as they were counted."""
        self._transfers = Transfers(settings.transfer_bytes_max, figures)

    def application(self, key: bytes | None) -> web.Application:
        """All pages, for who shows the key; without one, for this machine."""
        application = web.Application(middlewares=[self._refusals, _guard(key)])
        application.add_routes(
            [
                web.get("/health", _health),
                web.get(ONE, self._read, allow_head=False),
                web.get(f"{ONE}/length", self._length, allow_head=False),
                web.put(ONE, self._put),
                web.patch(ONE, self._put_layers),
                web.post(ONE, self._append),
                web.delete(ONE, self._delete),
            ]
        )
        return application

    async def _put(self, request: web.Request) -> web.Response:
        name, _ = _asked(request)
        async with self._received(request) as layers:
            after = self._table.put(name, layers)
        self._figures.count("sequences_put")
        return _lengths(after)

    async def _put_layers(self, request: web.Request) -> web.Response:
        name, _ = _asked(request)
        async with self._received(request) as layers:
            after = self._table.put_layers(name, layers)
        self._figures.count("sequences_put")
        return _lengths(after)

    async def _append(self, request: web.Request) -> web.Response:
        name, query = _asked(request, "expected_length", "create")
        length = query.get("expected_length")
        if length is not None and not _LENGTH.fullmatch(length):
            raise InputError("expected_length must be a number of tokens, 0 or more")
        if query.get("create", "true") not in ("true", "false"):
            raise InputError("create must be true or false")
        async with self._received(request) as layers:
            after = self._table.append(
                name,
                layers,
                expected_length=None if length is None else int(length),
                creates=query.get("create") != "false",
            )
        self._figures.count("sequences_appended")
        return _lengths(after)

    async def _read(self, request: web.Request) -> web.StreamResponse:
        name, query = _asked(request, "layers")
        found = self._find(name)
        layers = dict(found.layers)
        if "layers" in query:
            wanted = parse_layers(query["layers"])
            missing = [layer_idx for layer_idx in wanted if layer_idx not in layers]
            if missing:
                raise MissingError(f"the sequence {name} has no layer {missing[0]}")
            layers = {layer_idx: layers[layer_idx] for layer_idx in wanted}
        header, num_bytes, pieces = lay_out(layers)
        response = web.StreamResponse(headers={"Content-Type": CONTENT_TYPE})
        response.content_length = len(header) + num_bytes
        with self._transfers.holding(num_bytes):
            # Who reads holds these pieces, whatever becomes of the sequence meanwhile.
            try:
                async with asyncio.timeout(self._settings.request_s_max):
                    response.headers[DIGEST_HEADER] = await digest_of(header, pieces)
                    await response.prepare(request)
                    await response.write(header)
                    for piece in pieces:
                        await response.write(piece)
                    await response.write_eof()
            except TimeoutError as error:
                if request.transport is not None:
                    request.transport.abort()
                raise ConnectionResetError("read too slowly") from error
        self._figures.count("sequences_read")
        self._figures.count("sequence_bytes_sent", num_bytes)
        return response

    async def _length(self, request: web.Request) -> web.Response:
        name, _ = _asked(request)
        return _lengths(self._find(name))

    async def _delete(self, request: web.Request) -> web.Response:
        name, _ = _asked(request)
        is_deleted = self._table.delete(name)
        self._note()
        self._figures.count("sequences_deleted", int(is_deleted))
        return web.json_response({"deleted": is_deleted})

    def _find(self, name: str) -> StoredSequence:
        found = self._table.find(name)
        if found is None:
            raise MissingError(f"there is no sequence {name}: put it first")
        return found

    def _note(self) -> None:
        self._figures.note("sequences", len(self._table))
        self._figures.note("sequence_bytes", self._table.num_bytes)
        num_new = self._table.num_evicted - self._num_evicted
        self._figures.count("sequences_evicted", num_new)
        self._num_evicted += num_new

    @contextlib.asynccontextmanager
    async def _received(self, request: web.Request) -> AsyncIterator[dict[int, LayerKv]]:
        """The layers that a body holds; its bytes are held until they have a place or are let go.

        Nothing makes room for a body before all of it is there, so one that breaks off changes
        nothing at all.
        """
        body_bytes = request.content_length
        if "Content-Encoding" in request.headers:
            raise web.HTTPUnsupportedMediaType(reason="send the body as it is, not encoded")
        if body_bytes is None:
            raise web.HTTPLengthRequired(reason="say with Content-Length how long the body is")
        if body_bytes > self._settings.body_bytes_max:
            raise CapacityError(
                f"the body has {body_bytes} bytes and {self._settings.body_bytes_max} are taken: "
                "send fewer tokens or layers at a time"
            )
        with self._transfers.holding(body_bytes):
            async with asyncio.timeout(self._settings.request_s_max):
                digest = request.headers.get(DIGEST_HEADER)
                layers = await receive(request.content, body_bytes, digest)
            yield layers
            self._note()
        self._figures.count("sequence_bytes_received", body_bytes)

    @web.middleware
    async def _refusals(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Say what is wrong in one sentence, with the status that fits."""
        try:
            return await handler(request)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            refusal = self._refuse(error.status, f"{error.reason}: {request.method} {request.path}")
            for name in ("Allow", "Retry-After"):
                if name in error.headers:
                    refusal.headers[name] = error.headers[name]
            return refusal
        except InputError as error:
            return self._refuse(400, str(error))
        except MissingError as error:
            self._figures.count("sequences_missed")
            return _refusal(404, str(error))
        except RefusedError as error:
            return self._refuse(409, str(error))
        except CapacityError as error:
            return self._refuse(413, str(error))
        except CorruptDataError as error:
            return self._refuse(422, str(error))
        except TimeoutError:
            self._figures.count("sequence_requests_cut")
            return _refusal(408, f"the body took longer than {self._settings.request_s_max:g} s")
        except (OSError, web.RequestPayloadError):
            self._figures.count("sequence_requests_cut")
            raise

    def _refuse(self, status: int, message: str) -> web.Response:
        self._figures.count("sequence_requests_refused")
        return _refusal(status, message)


async def _health(_request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


def _asked(request: web.Request, *known: str) -> tuple[str, dict[str, str]]:
    """Name of the sequence, and what else stands in the request's address."""
    name = request.match_info["name"]
    check_name(name)
    query: dict[str, str] = {}
    for field, value in request.query.items():
        if field not in known or field in query:
            raise InputError(f"{field[:80]!r} can't be asked for here, or not twice")
        query[field] = value
    return name, query


def _lengths(sequence: StoredSequence) -> web.Response:
    layers = {str(idx): layer.num_tokens for idx, layer in sorted(sequence.layers.items())}
    return web.json_response({"length": sequence.num_tokens, "layers": layers})


def _refusal(status: int, message: str) -> web.Response:
    response = web.json_response({"error": {"message": message, "code": status}}, status=status)
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def _guard(key: bytes | None) -> Middleware:
    """Let in who shows the key; without one, who is on this machine and is no web page."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if key is None:
            if not names_loopback(request.host) or "Origin" in request.headers:
                raise web.HTTPForbidden(
                    reason="ask for 127.0.0.1 by that name, and not from a web page"
                )
        elif request.path != "/health":
            shown = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
            if not hmac.compare_digest(shown, b"Bearer " + key):
                raise web.HTTPUnauthorized(reason="send the key as 'Authorization: Bearer KEY'")
        return await handler(request)

    return guard
