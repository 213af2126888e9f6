"""The two legs of a hand-off, as exchanges of the relay.

A prefill's answer is nobody's but the router's: it is gathered and read. The decode engine's goes
to the client as any other.
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from kvkeep.router.handoff.machine import Failure, FailureKind
from kvkeep.router.handoff.plan import PARAMS
from kvkeep.router.handoff.seam import Unanswered
from kvkeep.router.handoff.splice import JsonObject, SpliceError
from kvkeep.router.handoff.transports.base import Transport
from kvkeep.router.health.book import FAILURES, Outcome
from kvkeep.router.relay.framing import (
    CHUNKED,
    ChunkScanner,
    FramingError,
    parse_response,
)
from kvkeep.router.relay.reader import LENGTH, Request
from kvkeep.router.router import Router
from kvkeep.router.snapshot import Endpoint

if TYPE_CHECKING:
    from kvkeep.router.relay.exchange import Exchange
    from kvkeep.router.relay.relay import Relay

ANSWER_BYTES_MAX: Final = 4 << 20
"""Of a prefill engine's answer, which is a token and the numbers of some blocks."""
_KINDS: Final = {
    Outcome.UNREACHABLE: FailureKind.UNREACHABLE,
    Outcome.TIMEOUT: FailureKind.TIMEOUT,
    Outcome.DECLINED: FailureKind.BUSY,
}
_REPLACED_FOR_PREFILL: Final = LENGTH | {b"accept-encoding"}
_ONE: Final = b"1"


def prefill_request(request: Request, body: JsonObject, params: bytes, fields: bytes) -> Request:
    """The request of one token that has a prefill engine compute the prompt.

    Args:
        request: The client's.
        body: Its body.
        params: What the transport tells a prefill engine.
        fields: Header lines to add.
    """
    edited = body.edited(
        {"max_tokens": _ONE, PARAMS: params},
        replace={"max_completion_tokens": _ONE},
        drop=("stream", "stream_options", "min_tokens"),
    )
    return request.with_body(edited, dropped=_REPLACED_FOR_PREFILL, fields=fields)


def decode_request(
    request: Request, body: JsonObject, params: bytes | None, fields: bytes
) -> Request:
    """The client's request, with what the decode engine has to know of the prefill, if any."""
    edited = request.body if params is None else body.edited({PARAMS: params})
    return request.with_body(edited, fields=fields)


def release_request(request: Request, body: bytes) -> Request:
    """A completion that nobody wants, with the headers of the client's request."""
    changed = request.with_body(body, dropped=_REPLACED_FOR_PREFILL)
    _, _, rest = changed.head.forwarded.partition(b"\r\n")
    changed.head.forwarded = b"POST /v1/completions HTTP/1.1\r\n" + rest
    return changed


def kind_of(unanswered: Unanswered) -> FailureKind:
    """What went wrong, by how the exchange ended."""
    if unanswered.outcome is None:
        return FailureKind.NO_ENDPOINT
    return _KINDS.get(unanswered.outcome, FailureKind.BROKEN)


class Gathered(asyncio.Transport):
    """A response that is kept; there is no socket behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.data = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Keep it, as far as it could be an answer."""
        if len(self.data) <= ANSWER_BYTES_MAX:
            self.data += data


class Aside:
    """An exchange on the router's own account: asker and leg in one."""

    is_stalled = False
    note = ""

    def __init__(self, relay: "Relay", router: Router, tried: list[Endpoint]) -> None:
        self.relay, self.router, self.tried = relay, router, tried
        self.gathered = Gathered()
        self.transport: asyncio.Transport = self.gathered
        self.endpoint: Endpoint | None = None
        self.outcome: Outcome | None = None
        self.keeps = False

    def chosen(self, endpoint: Endpoint) -> None:
        """It goes there."""
        self.endpoint = endpoint

    def began(self) -> None:
        """The engine has it."""

    def answered(self) -> None:
        """The response begins."""

    def ended(self, outcome: Outcome) -> None:
        """How it went."""
        self.outcome = outcome

    def failed(self, unanswered: Unanswered) -> None:
        """There is no response."""
        raise NotImplementedError

    def exchange_ended(self, keeps: bool, *, is_well: bool = True) -> None:
        """There is one, whole or mended."""
        raise NotImplementedError

    def reset(self) -> None:
        """It broke off."""
        raise NotImplementedError

    def pump(self) -> None:
        """The request is whole."""

    def read_body(self, is_wanted: bool) -> None:
        """It is written already."""

    def refuse(
        self, status: int, message: str, *, retry_after_s: int | None = None, fields: bytes = b""
    ) -> None:
        """What is refused comes to ``failed``."""
        raise AssertionError(message)


class PrefillLeg(Aside):
    """Has a prompt computed, and finds out what is offered."""

    def __init__(
        self,
        relay: "Relay",
        router: Router,
        tried: list[Endpoint],
        transport: Transport,
        ended: Callable[["PrefillLeg"], None],
    ) -> None:
        """Report once, with ``offer``, ``refusal`` or ``failure``.

        Args:
            relay: Exchanges it.
            router: Chooses among prefill engines.
            tried: Those that are not chosen any more.
            transport: Knows an offer when it sees one.
            ended: Told when it is over.
        """
        super().__init__(relay, router, tried)
        self._transport, self._ended = transport, ended
        self.offer: bytes | None = None
        self.refusal: bytes | None = None
        """A response that says what is wrong with the request, ready to be passed on."""
        self.failure: Failure | None = None
        self.retry_after_s: int | None = None
        """Of the failure, where the engine is busy and says when it won't be."""

    def failed(self, unanswered: Unanswered) -> None:
        """The engine could not be had, or said nothing."""
        self.retry_after_s = unanswered.retry_after_s
        self._fail(kind_of(unanswered), unanswered.status, f"prefill: {unanswered.message}")

    def reset(self) -> None:
        """The answer broke off."""
        self._fail(FailureKind.BROKEN, 502, "prefill: the engine broke off its response")

    def exchange_ended(self, keeps: bool, *, is_well: bool = True) -> None:
        """The answer is here."""
        self.keeps = keeps
        data = self.gathered.data
        if self.outcome in FAILURES and self.outcome is not Outcome.ERROR:
            self.reset()
            return
        try:
            status, body = _split(data)
        except FramingError as error:
            self._fail(FailureKind.BROKEN, 502, f"prefill: {error.message}")
            return
        if status >= 500:
            self._fail(FailureKind.ERROR, 502, f"prefill: the engine answered {status}")
        elif status >= 400:
            self.refusal = data
            self._ended(self)
        else:
            self._find_offer(body)

    def _find_offer(self, body: bytes) -> None:
        try:
            offer = JsonObject(body).find(PARAMS)
        except SpliceError:
            offer = None
        if offer is None or self._transport.decode_params(offer) is None:
            message = (
                "prefill: the engine offers no blocks: start it with the connector of the "
                "router's transport"
            )
            self._fail(FailureKind.NO_OFFER, 502, message)
        else:
            self.offer = offer
            self._ended(self)

    def _fail(self, kind: FailureKind, status: int, message: str) -> None:
        self.offer, self.failure = None, Failure(kind, status, message)
        self._ended(self)


def _split(data: bytes) -> tuple[int, bytes]:
    """Status and body of a response as the relay would have sent it to a client.

    Raises:
        FramingError: It is too long.
    """
    if len(data) > ANSWER_BYTES_MAX:
        raise FramingError(502, "the engine's answer is too long")
    while True:
        end = data.index(b"\r\n\r\n") + 4
        head = parse_response(data[:end], is_for_head=False)
        data = data[end:]
        if head.status >= 200:
            break
    if head.length == CHUNKED:
        data = b"".join(ChunkScanner().feed(data))
    return head.status, data


class ReleaseLeg(Aside):
    """Gives an offer up; whatever comes of it, the lease does the rest."""

    def __init__(
        self, relay: "Relay", router: Router, ended: Callable[["ReleaseLeg"], None]
    ) -> None:
        super().__init__(relay, router, [])
        self._ended = ended
        self.exchange: Exchange | None = None
        """What runs it."""
        self.is_done = False
        """Whether a decode engine was told."""

    def failed(self, unanswered: Unanswered) -> None:
        """Nobody was told."""
        self._ended(self)

    def reset(self) -> None:
        """It may have been told."""
        self._ended(self)

    def exchange_ended(self, keeps: bool, *, is_well: bool = True) -> None:
        """It was told."""
        try:
            # It is refused by an engine that knows what to do then, or by one that does not.
            self.is_done = _split(self.gathered.data)[0] in (400, 404)
        except FramingError:
            self.is_done = False
        self._ended(self)
