"""What becomes of a request that names a cartridge before an engine is chosen for it.

Its body goes on byte by byte as it came, but for two members: ``kv_transfer_params`` gets the
cartridge's id, so that the engine need not know how requests name cartridges, and ``cache_salt``
gets its digest, so that the engine's own prefix cache keeps cartridges apart. A request that has
both already, and one that gets no cartridge, is not touched at all.
"""

from pathlib import Path
from typing import Any, Final

import msgspec

from kvkeep.cartridges.dispatch.asked import EXTRA_BODY, PARAMS, Asked, of_body
from kvkeep.cartridges.dispatch.catalogue import Catalogue, Known, read_catalogue
from kvkeep.cartridges.dispatch.config import build_rule
from kvkeep.cartridges.dispatch.dispatcher import Dispatcher, UnknownCartridgeError
from kvkeep.cartridges.dispatch.rules import ID_KEY, headers_of
from kvkeep.cartridges.dispatch.salting import salted
from kvkeep.cartridges.registry import Registry
from kvkeep.cartridges.store.library import default_folder
from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.router.cartridges.holders import Holders
from kvkeep.router.cartridges.outcomes import FOUND, DispatchRefusal
from kvkeep.router.cartridges.settings import CartridgeSettings
from kvkeep.router.handoff.splice import JsonObject, SpliceError
from kvkeep.router.relay.reader import Request
from kvkeep.router.request import RequestView

PATHS: Final = frozenset({b"/v1/completions", b"/v1/chat/completions", b"/v1/responses"})
"""Whose requests vLLM hands to its connector with ``kv_transfer_params``."""
SALT: Final = "cache_salt"
UNREAD: Final = "cartridge=unread"


class _Fields(msgspec.Struct):
    kv_transfer_params: Any = None
    vllm_xargs: Any = None
    extra_body: Any = None
    cache_salt: Any = None


_decoder = msgspec.json.Decoder(_Fields)


def library_folder(settings: CartridgeSettings) -> Path:
    """Folder of the registry, default applied."""
    return Path(settings.library) if settings.library else default_folder()


class CartridgeDesk:
    """Dispatches requests; everything but ``read_registry`` on the event loop's thread."""

    def __init__(self, settings: CartridgeSettings) -> None:
        """Read the registry.

        Raises:
            InputError: It can't be opened.
            UnavailableError, CorruptDataError: It can't be read.
        """
        self.settings, self.holders = settings, Holders()
        rule = build_rule(settings.router)
        self._dispatcher = Dispatcher(rule, settings.unknown)
        self.headers = headers_of(rule)
        """Names of the headers that count."""
        self._registry = Registry(library_folder(settings))
        self.counts = dict.fromkeys(FOUND, 0)
        self.num_errors = 0
        """Times at which the registry could not be read again."""
        self.catalogue: Catalogue = self.read_registry()

    def read_registry(self) -> Catalogue:
        """What the registry holds now; waits for the disk, so not on the event loop.

        Raises:
            UnavailableError, CorruptDataError: As when it was made.
        """
        return read_catalogue(self._registry)

    def close(self) -> None:
        """Close the registry."""
        self._registry.close()

    # ---- Requests

    def fit(self, request: Request, view: RequestView) -> Request:
        """Find out which cartridge a request gets; returns what an engine is to be sent.

        Args:
            request: The client's.
            view: Told of the cartridge, and of what X-Kvkeep-Route should say.

        Raises:
            DispatchRefusal: It can't be served.
        """
        try:
            fitted = self.explain(request, view)
        except DispatchRefusal as refusal:
            self.counts["unknown" if refusal.status in (404, 503) else "refused"] += 1
            raise
        if view.cartridge is not None:
            self.counts["chosen"] += 1
        elif view.note:
            self.counts["unread" if view.note == UNREAD else "unknown"] += 1
        return fitted

    def explain(self, request: Request, view: RequestView) -> Request:
        """What ``fit`` would do, uncounted.

        Raises:
            DispatchRefusal: It would be refused.
        """
        head = request.head
        if head.method != b"POST" or head.target.partition(b"?")[0] not in PATHS:
            return request
        try:
            return self._fitted(request, view)
        except UnknownCartridgeError as error:
            raise DispatchRefusal(404, str(error)) from error
        except UnavailableError as error:
            raise DispatchRefusal(503, str(error)) from error
        except (InputError, SpliceError) as error:
            raise DispatchRefusal(400, str(error)) from error

    def _fitted(self, request: Request, view: RequestView) -> Request:
        if not request.is_whole:
            return self._unread(request, view)
        fields = _find_fields(request.body)
        asked = of_body(msgspec.structs.asdict(fields), _header_of(request))
        decision = self._dispatcher.decide(asked, self.catalogue)
        if decision.cartridge is None:
            if decision.is_missing:
                view.note = f"cartridge=none {decision.reason}"
            return request
        fitted = _with_cartridge(request, fields, decision.cartridge)
        view.cartridge = decision.cartridge.cartridge_id
        view.note = f"cartridge={view.cartridge} {decision.reason}"
        return fitted

    def _unread(self, request: Request, view: RequestView) -> Request:
        """Let a request pass whose body is not looked through, if nothing else names one for it."""
        decision = self._dispatcher.decide(Asked((), _header_of(request)), self.catalogue)
        if decision.cartridge is not None:
            raise DispatchRefusal(
                413,
                "the body is too large for a request with a cartridge: shorten it, or raise "
                "relay.gathered_bytes_max",
            )
        view.note = UNREAD
        return request


def _find_fields(body: bytes) -> _Fields:
    """What matters of a body.

    Raises:
        SpliceError: It is no JSON object.
    """
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise SpliceError(f"the body must be a JSON object in UTF-8: {said}") from error


def _header_of(request: Request) -> Any:
    def find(name: str) -> str | None:
        value = request.head.field(name.encode("ascii"))
        return None if value is None else value.decode("latin-1")

    return find


def _with_cartridge(request: Request, fields: _Fields, cartridge: Known) -> Request:
    """The request as an engine is to see it; the same if it says all that already.

    Raises:
        InputError: Its salt is none, or another cartridge's.
        SpliceError: Its body can't be edited.
    """
    if not isinstance(fields.cache_salt, str | None):
        raise InputError("cache_salt must be a text: write it in quotes, or leave it out")
    salt = salted(cartridge.digest, fields.cache_salt)
    params = fields.kv_transfer_params
    named = params.get(ID_KEY) if isinstance(params, dict) else None
    if named == cartridge.cartridge_id and fields.cache_salt == salt:
        return request
    body = JsonObject(request.body)
    told = {ID_KEY: msgspec.json.encode(cartridge.cartridge_id)}
    edited = body.edited(
        {PARAMS: JsonObject(_params_of(body, fields)).edited(told), SALT: msgspec.json.encode(salt)}
    )
    return request.with_body(edited)


def _params_of(body: JsonObject, fields: _Fields) -> bytes:
    """What a request has as transfer parameters, as JSON; those of ``extra_body`` if no others."""
    extra = fields.extra_body
    if isinstance(fields.kv_transfer_params, dict):
        found = body.find(PARAMS)
    elif fields.kv_transfer_params is not None:
        raise InputError(f"{PARAMS} must be an object: write {{...}}, or leave it out")
    elif isinstance(extra, dict) and isinstance(extra.get(PARAMS), dict):
        inside = body.find(EXTRA_BODY)
        found = None if inside is None else JsonObject(inside).find(PARAMS)
    else:
        found = None
    return b"{}" if found is None else found
