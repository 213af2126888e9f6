"""What all hand-offs of a router share: its two policies, its transport, and what was counted."""

import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from kvkeep.model.errors import InputError
from kvkeep.router.handoff.counts import HandOffCounts
from kvkeep.router.handoff.legs import ReleaseLeg, release_request
from kvkeep.router.handoff.machine import HandOff
from kvkeep.router.handoff.plan import (
    PATHS,
    Facts,
    ParamsGuard,
    PlanError,
    estimate_tokens,
    refuse_params,
    why_not_possible,
    why_not_worth,
)
from kvkeep.router.handoff.serving import HandedOff
from kvkeep.router.handoff.settings import HandOffSettings
from kvkeep.router.handoff.splice import JsonObject, SpliceError
from kvkeep.router.handoff.transports.base import Transport
from kvkeep.router.health.book import Outcome
from kvkeep.router.relay.exchange import Exchange
from kvkeep.router.relay.reader import Request
from kvkeep.router.request import RequestView
from kvkeep.router.router import Router, UnknownModelError
from kvkeep.router.snapshot import Role

if TYPE_CHECKING:
    from kvkeep.router.relay.relay import Relay
    from kvkeep.router.relay.server import ClientConnection

RELEASE_S: Final = 5.0
"""A decode engine that takes longer to refuse a request is not waited for."""
RELEASES_MAX: Final = 256
"""At one time; what is beyond is left to the leases."""
ID_BYTES: Final = 16


def make_transport(settings: HandOffSettings) -> Transport:
    """The transport that the settings name; imported only where it is used."""
    if settings.transport == "pool":
        from kvkeep.router.handoff.transports.pool import PoolTransport

        return PoolTransport()
    if settings.transport == "nixl":
        from kvkeep.router.handoff.transports.nixl import NixlTransport

        return NixlTransport(settings.offer_lease_s)
    raise InputError(f"there is no transport {settings.transport!r}: choose pool or nixl")


def new_id() -> str:
    """An id for a request that came without one."""
    return secrets.token_hex(ID_BYTES)


class GuardedExchange(Exchange):
    """Passes on a body that comes in pieces, unless one of them names parameters of a hand-off."""

    __slots__ = ("_connected_client", "_guard")

    def __init__(
        self,
        client: "ClientConnection",
        request: Request,
        view: RequestView,
        note: str,
        guard: ParamsGuard,
    ) -> None:
        """Be new.

        Args:
            client: Who gets the response.
            request: What is asked; not whole.
            view: What policies see of it.
            note: What else the header X-Kvkeep-Route says.
            guard: Has seen what there is of the body.
        """
        super().__init__(client, request, view, note=note)
        self._connected_client, self._guard = client, guard

    def take_body(self, payload: bytes, is_over: bool) -> None:
        """More of the body; an engine never gets the end of one that is refused."""
        try:
            self._guard.take(payload)
        except PlanError as error:
            self._connected_client.refuse_body(400, str(error))
            return
        super().take_body(payload, is_over)


class HandOffDesk:
    """Begins hand-offs, or sends a request to a decode engine alone and says why."""

    def __init__(
        self,
        relay: "Relay",
        settings: HandOffSettings,
        prefill_router: Router,
        release_router: Router,
        ids: Callable[[], str] = new_id,
    ) -> None:
        """Have begun none.

        Args:
            relay: Its router chooses among decode engines.
            settings: When and how.
            prefill_router: Chooses among prefill engines.
            release_router: Chooses among decode engines, for what is no client's request.
            ids: Where ids of requests come from.
        """
        self.relay, self.settings = relay, settings
        self.prefill_router, self._release_router = prefill_router, release_router
        self._ids = ids
        self.transport = make_transport(settings)
        self.counts = HandOffCounts()
        self._releases: dict[Exchange, float] = {}
        """What gives offers up at the moment, and since when."""

    @property
    def decode_router(self) -> Router:
        """Chooses among decode engines."""
        return self.relay.router

    @property
    def is_ready(self) -> bool:
        """Whether a request that is to be handed off could be served now."""
        fleet = self.relay.router.fleet
        can_prefill = fleet.ready(Role.PREFILL, None) or self.settings.fallback != "none"
        return bool(can_prefill and fleet.ready(Role.DECODE, None))

    def new_machine(self) -> HandOff:
        """For one request."""
        transport = self.transport
        return HandOff(
            self.settings,
            self.relay.clock.now_s(),
            lease_s=transport.lease_s,
            is_reusable=transport.is_reusable,
        )

    def id_field(self, request: Request) -> bytes:
        """A header line that gives both legs one id; empty if the client has given it one."""
        if request.head.field(b"x-request-id") is not None:
            return b""
        return f"X-Request-Id: {self._ids()}\r\n".encode("ascii")

    # --- Requests ---------------------------------------------------------------------------------

    def begin(self, client: "ClientConnection", request: Request, view: RequestView) -> None:
        """Serve a request."""
        try:
            body, reason = self._look_at(request)
        except (SpliceError, PlanError) as error:
            self._refuse(client, str(error))
            return
        if body is not None and not reason:
            reason = why_not_worth(self.facts_of(view, body), self.settings)
        if body is None or reason:
            self._skip(client, request, view, reason)
            return
        served = HandedOff(self, client, request, body, view)
        client.serve(served)
        served.begin()

    def _look_at(self, request: Request) -> tuple[JsonObject | None, str]:
        """The body, and why it can't be handed off.

        Raises:
            SpliceError: It can't be served.
            PlanError: It may not be served.
        """
        head = request.head
        if head.method != b"POST" or head.target.partition(b"?")[0] not in PATHS:
            # Engines know these parameters in other forms of requests too, and spell paths freely.
            if self._refuses_params and request.is_whole:
                refuse_params(request.body)
            return None, "path"
        if not request.is_whole:
            return None, "size"
        body = JsonObject(request.body)
        return body, why_not_possible(body, self.settings)

    def facts_of(self, view: RequestView, body: JsonObject) -> Facts:
        """What is known of a request's work."""
        # Whoever cut the prompt into blocks has counted better.
        is_counted = view.prefix is not None and view.num_tokens is not None
        num_tokens = (view.num_tokens or 0) if is_counted else estimate_tokens(body)
        if view.prefix is None or not self.settings.min_tokens:
            return Facts(num_tokens, num_tokens)
        try:
            # Explaining changes nothing: the choice that counts is made when the prefill is done.
            choice = self.decode_router.route(view, self.relay.clock.now_s(), explain=True)
        except UnknownModelError:
            return Facts(num_tokens, num_tokens)  # whoever is asked first says so
        return Facts(num_tokens, choice.num_uncached if choice.num_cached_blocks else num_tokens)

    def explain(self, request: Request, view: RequestView) -> dict[str, str | None]:
        """What would be done with a request: ``hand_off``, or why it would not be handed off.

        Raises:
            SpliceError: It would be refused.
            PlanError: It would be refused.
        """
        body, reason = self._look_at(request)
        if body is not None and not reason:
            reason = why_not_worth(self.facts_of(view, body), self.settings)
        if reason:
            return {"plan": reason, "prefill": None}
        choice = self.prefill_router.route(view, self.relay.clock.now_s(), explain=True)
        name = None if choice.endpoint is None else choice.endpoint.name
        return {"plan": "hand_off", "prefill": name}

    def _skip(
        self, client: "ClientConnection", request: Request, view: RequestView, reason: str
    ) -> None:
        note = f"skipped={reason}"
        if self._refuses_params and not request.is_whole:
            guard = ParamsGuard()
            try:
                guard.take(request.body)
            except PlanError as error:
                self._refuse(client, str(error))
                return
            exchange: Exchange = GuardedExchange(client, request, view, note, guard)
        else:
            exchange = Exchange(client, request, view, note=note)
        self.counts.skips[reason] += 1
        client.serve(exchange)
        exchange.begin()

    @property
    def _refuses_params(self) -> bool:
        return self.settings.client_params == "refuse"

    def _refuse(self, client: "ClientConnection", message: str) -> None:
        self.counts.outcomes["refused"] += 1
        client.refuse(400, message)

    # --- Offers that nobody wants -----------------------------------------------------------------

    def release(self, request: Request, offer: bytes) -> None:
        """Have an offer given up; nobody waits for it."""
        body = self.transport.release_body(offer)
        if body is None:
            return
        self.counts.num_released += 1
        if len(self._releases) >= RELEASES_MAX:
            self.counts.num_unreleased += 1
            return
        leg = ReleaseLeg(self.relay, self._release_router, self._released)
        exchange = Exchange(leg, release_request(request, body), RequestView(""), leg)
        leg.exchange = exchange
        self._releases[exchange] = self.relay.clock.now_s()
        exchange.begin()

    def _released(self, leg: ReleaseLeg) -> None:
        self.counts.num_unreleased += not leg.is_done
        if leg.exchange is not None:
            self._releases.pop(leg.exchange, None)

    def look(self, now_s: float) -> None:
        """See to releases that take too long."""
        late = [each for each, since_s in self._releases.items() if now_s - since_s > RELEASE_S]
        for exchange in late:
            self._give_up(exchange, Outcome.TIMEOUT)

    def close(self) -> None:
        """End them."""
        for exchange in list(self._releases):
            self._give_up(exchange, Outcome.CLIENT_LEFT)

    def _give_up(self, exchange: Exchange, outcome: Outcome) -> None:
        del self._releases[exchange]
        self.counts.num_unreleased += 1
        exchange.cancel(outcome)
