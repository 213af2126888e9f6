"""A client's request while it is handed off: what the machine decides is done here."""

from typing import TYPE_CHECKING

from kvkeep.router.handoff.legs import PrefillLeg, decode_request, kind_of, prefill_request
from kvkeep.router.handoff.machine import (
    Actions,
    Answer,
    CancelDecode,
    CancelPrefill,
    Failure,
    FailureKind,
    HandOff,
    HandOffState,
    PassOn,
    RelayFallback,
    ReleaseOffer,
    SendDecode,
    SendPrefill,
)
from kvkeep.router.handoff.seam import Unanswered
from kvkeep.router.handoff.splice import JsonObject
from kvkeep.router.health.book import Outcome
from kvkeep.router.policies.base import Choice
from kvkeep.router.relay.exchange import Exchange
from kvkeep.router.relay.reader import Request
from kvkeep.router.request import RequestView
from kvkeep.router.router import Router
from kvkeep.router.snapshot import Endpoint

if TYPE_CHECKING:
    from kvkeep.router.handoff.desk import HandOffDesk
    from kvkeep.router.relay.server import ClientConnection


class HandedOff:
    """What a client's connection is busy with; as a leg, the decode engine's."""

    can_take_body = False

    def __init__(
        self,
        desk: "HandOffDesk",
        client: "ClientConnection",
        request: Request,
        body: JsonObject,
        view: RequestView,
    ) -> None:
        """Wait; ``begin`` sends the prompt to a prefill engine."""
        self._desk, self._client = desk, client
        self._request, self._body, self.view = request, body, view
        self._fields = desk.id_field(request)
        self._machine: HandOff = desk.new_machine()
        self._exchange: Exchange | None = None
        self._prefill: PrefillLeg | None = None
        """The last one."""
        self._tried_prefill: list[Endpoint] = []
        self._decode_endpoint: Endpoint | None = None
        self._is_counted = False
        self._retry_after_s = 1
        """What a client is told that gets 503: what a busy engine said last, if one did."""
        self.router = desk.decode_router
        self.tried: list[Endpoint] = []
        self.note = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing will come of it any more."""
        return self._machine.is_over

    @property
    def is_answered(self) -> bool:
        """Whether the client has the beginning of a response."""
        return self._machine.state is HandOffState.ANSWERING

    @property
    def _now_s(self) -> float:
        return self._desk.relay.clock.now_s()

    def begin(self) -> None:
        """Go."""
        self._act(self._machine.begin(self._now_s))

    # --- Actions ----------------------------------------------------------------------------------

    def _act(self, actions: Actions) -> None:
        """Do what the machine wants; what sends or answers comes last, and may lead to more."""
        for action in actions:
            match action:
                case SendPrefill(attempt):
                    self._send_prefill(attempt)
                case SendDecode(attempt, offer):
                    self._send_decode(attempt, offer)
                case CancelPrefill(is_late):
                    endpoint = None if self._prefill is None else self._prefill.endpoint
                    self._cancel(endpoint, self._tried_prefill, is_late)
                case CancelDecode(is_late):
                    self._cancel(self._decode_endpoint, self.tried, is_late)
                case ReleaseOffer(offer):
                    self._desk.release(self._request, offer)
                case RelayFallback(label):
                    self._desk.counts.fell_back(label)
                case Answer(status, message):
                    self._answer(status, message)
                case PassOn():
                    self._pass_on()
        self._settle()

    def _settle(self) -> None:
        """Count it, once it is over."""
        if self._machine.is_over and not self._is_counted:
            self._is_counted = True
            self._desk.counts.ended(self._machine)
            # They refer to this object: without that, nothing of it waits for the collector.
            self._exchange = self._prefill = None

    def _send_prefill(self, attempt: int) -> None:
        desk = self._desk
        if attempt > 1 and (refused := self._no_retry(desk.prefill_router, self._tried_prefill)):
            self._act(self._machine.prefill_failed(refused, self._now_s))
            return
        request = prefill_request(
            self._request, self._body, desk.transport.prefill_params(), self._fields
        )
        leg = self._prefill = PrefillLeg(
            desk.relay,
            desk.prefill_router,
            self._tried_prefill,
            desk.transport,
            self._prefill_ended,
        )
        self._exchange = Exchange(leg, request, self.view, leg)
        self._exchange.begin()

    def _no_retry(self, router: Router, tried: list[Endpoint]) -> Failure | None:
        """Why nothing can be tried again; None if it can, and was taken from the budget."""
        if not router.may_retry(self.view, tried):
            return Failure(FailureKind.NO_ENDPOINT, 503, "no other engine is ready")
        if not router.take_retry(self._now_s):
            return Failure(FailureKind.NO_RETRY, 503, "too many requests are tried again")
        return None

    def _send_decode(self, attempt: int, offer: bytes | None) -> None:
        desk = self._desk
        if attempt > 1 and (refused := self._no_retry(self.router, self.tried)):
            self._act(self._machine.decode_failed(refused, self._now_s))
            return
        params = None if offer is None else desk.transport.decode_params(offer)
        self.note = self._note(offer)
        request = decode_request(self._request, self._body, params, self._fields)
        self._exchange = Exchange(self._client, request, self.view, self)
        self._exchange.begin()

    def _note(self, offer: bytes | None) -> str:
        """What the header says of the hand-off."""
        machine, prefill = self._machine, self._prefill
        if machine.fallback:
            return f"fallback={machine.fallback}"
        name = "none" if prefill is None or prefill.endpoint is None else prefill.endpoint.name
        blocks = "" if offer is not None else " empty"
        return f"prefill={name} transport={self._desk.transport.name}{blocks}"

    def _cancel(self, endpoint: Endpoint | None, tried: list[Endpoint], is_late: bool) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.cancel(Outcome.TIMEOUT if is_late else Outcome.CLIENT_LEFT)
        if is_late:
            _remember(endpoint, tried)

    def _answer(self, status: int, message: str) -> None:
        relay = self._desk.relay
        note = f"fallback={self._machine.fallback}" if self._machine.fallback else ""
        line = relay.route_line(Choice(None, "the hand-off failed"), "hand-off", note)
        self._client.refuse(
            status,
            message,
            retry_after_s=self._retry_after_s if status == 503 else None,
            fields=line,
        )

    def _pass_on(self) -> None:
        assert self._prefill is not None
        assert self._prefill.refusal is not None
        self._client.answer(self._prefill.refusal, keeps=self._prefill.keeps)

    # --- The prefill leg --------------------------------------------------------------------------

    def _prefill_ended(self, leg: PrefillLeg) -> None:
        machine, now_s = self._machine, self._now_s
        if leg is not self._prefill:
            return
        if leg.failure is not None:
            _remember(leg.endpoint, self._tried_prefill)
            self._retry_after_s = leg.retry_after_s or self._retry_after_s
            self._act(machine.prefill_failed(leg.failure, now_s))
        elif leg.refusal is not None:
            self._act(machine.prefill_refused(now_s))
        else:
            assert leg.offer is not None
            is_empty = self._desk.transport.is_empty(leg.offer)
            self._act(
                machine.prefill_empty(now_s)
                if is_empty
                else machine.prefill_answered(leg.offer, now_s)
            )

    # --- The decode leg ---------------------------------------------------------------------------

    def chosen(self, endpoint: Endpoint) -> None:
        """It goes there."""
        self._decode_endpoint = endpoint

    def began(self) -> None:
        """The decode engine knows of the offer."""
        self._machine.decode_began()

    def answered(self) -> None:
        """The client gets the beginning of the response."""
        self._machine.decode_answered(self._now_s)

    def ended(self, outcome: Outcome) -> None:
        """The response is over, if there was one."""
        self._machine.decode_ended(is_well=outcome is Outcome.FINISHED, now_s=self._now_s)
        self._settle()

    def failed(self, unanswered: Unanswered) -> None:
        """There was none."""
        _remember(self._decode_endpoint, self.tried)
        self._retry_after_s = unanswered.retry_after_s or self._retry_after_s
        failure = Failure(kind_of(unanswered), unanswered.status, f"decode: {unanswered.message}")
        self._act(self._machine.decode_failed(failure, self._now_s))

    # --- What the client and the clock say --------------------------------------------------------

    def take_body(self, payload: bytes, is_over: bool) -> None:
        """Only whole requests are handed off."""

    def client_writable(self, is_writable: bool) -> None:
        """The client reads slower than the decode engine sends, or has caught up."""
        if self._exchange is not None and self.is_answered:
            self._exchange.client_writable(is_writable)

    def client_lost(self) -> None:
        """The client left."""
        self._act(self._machine.client_left(self._now_s))

    def look(self, now_s: float, silence_s_max: float) -> None:
        """See to what takes too long."""
        if self._exchange is not None:
            self._exchange.look(now_s, silence_s_max)
        self._act(self._machine.tick(now_s))

    def stop(self, message: str) -> None:
        """The router ends."""
        if self.is_answered and self._exchange is not None:
            self._exchange.stop(message)
        else:
            self._act(self._machine.stop(message, self._now_s))


def _remember(endpoint: Endpoint | None, tried: list[Endpoint]) -> None:
    """What failed is not chosen again."""
    if endpoint is not None and endpoint not in tried:
        tried.append(endpoint)
