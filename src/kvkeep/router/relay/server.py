"""Client connections: requests in, responses out, one at a time on each.

One object per connection, called back by the event loop; nothing here blocks, and no request costs
a task of its own unless a connection to an engine has to be made first.
"""

import asyncio
import socket
import struct
from typing import TYPE_CHECKING, Final, Protocol, cast

from kvkeep.router.cartridges.outcomes import DispatchRefusal
from kvkeep.router.limits.admission import Visit, VisitState
from kvkeep.router.limits.gate import Refusal
from kvkeep.router.relay.errors import error_response
from kvkeep.router.relay.exchange import Exchange
from kvkeep.router.relay.framing import FramingError, RequestHead
from kvkeep.router.relay.reader import Request, RequestReader
from kvkeep.router.relay.waiting import WaitingForEngine, WaitingForPrefix
from kvkeep.router.request import RequestView

if TYPE_CHECKING:
    from kvkeep.router.relay.relay import Relay

UNAUTHORIZED: Final = 401
UNAVAILABLE: Final = 503
PIPELINED_BYTES_MAX: Final = 256 << 10
"""Of requests behind the one that is served; then the connection is not read for a while."""
LINGER_BYTES_MAX: Final = 64 << 20
LINGER_S: Final = 2.0
"""How long, and for how much, a client that still sends is listened to after its last response: a
connection closed with bytes unread is reset, and takes the response with it."""
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER: close without the usual goodbye."""


class Served(Protocol):
    """What a connection is busy with."""

    @property
    def can_take_body(self) -> bool:
        """Whether more of a body that is not whole has a place to go."""
        ...

    @property
    def is_answered(self) -> bool:
        """Whether the client has the beginning of a response."""
        ...

    def take_body(self, payload: bytes, is_over: bool) -> None:
        """More of the request's body came."""
        ...

    def client_writable(self, is_writable: bool) -> None:
        """The client reads slower than it is sent, or has caught up."""
        ...

    def client_lost(self) -> None:
        """The client left."""
        ...

    def look(self, now_s: float, silence_s_max: float) -> None:
        """Time has passed."""
        ...

    def stop(self, message: str) -> None:
        """The router ends."""
        ...


class ClientConnection(asyncio.Protocol):
    """One client's connection."""

    __slots__ = (
        "_is_advancing",
        "_is_body_wanted",
        "_is_closing",
        "_is_read",
        "_is_reading",
        "_known",
        "_lingered_bytes",
        "_reader",
        "_request",
        "_served",
        "_since_s",
        "_view",
        "_visit",
        "is_stalled",
        "relay",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(self, relay: "Relay") -> None:
        settings = relay.settings
        self.relay = relay
        self._reader = RequestReader(settings.gathered_bytes_max, settings.body_bytes_max)
        self._request: Request | None = None
        """The request that is served."""
        self._known: RequestHead | None = None
        """Of the request whose body is being gathered, once its key was looked at."""
        self._served: Served | None = None
        """Who serves it."""
        self._visit: Visit | None = None
        self._view: RequestView | None = None
        """What is known of the request since it was let in."""
        self._since_s = relay.now_s
        """When what is being waited for began."""
        self._lingered_bytes = -1
        """What came after the last response; -1 before it."""
        self._is_advancing = False
        self._is_closing = False
        """Whether no further request is served."""
        self._is_read = True
        """Whether the request that is served has come to its end."""
        self._is_body_wanted = True
        """Whether the engine takes more of a body that is on its way."""
        self._is_reading = True
        self.is_stalled = False
        """Whether the client takes less than it is sent."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing has begun."""
        return self._request is None and not self._reader.is_inside

    # --- Called by the event loop ----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came."""
        # uvloop's transports are none by inheritance, only by what they can do.
        self.transport = cast(asyncio.Transport, transport)
        self.relay.clients.add(self)
        if len(self.relay.clients) > self.relay.settings.connections_max:
            self._refuse_connection(503, "the router has as many connections as it may", 1)

    def data_received(self, data: bytes) -> None:
        """The client sent bytes."""
        if self._is_closing:
            self._discard(data)
            return
        if not self._reader.is_inside:
            self._since_s = self.relay.now_s
        self._reader.feed(data)
        if self._request is None:
            self._advance()
        elif not self._is_read:
            self.pump()
        elif self._reader.num_waiting_bytes > PIPELINED_BYTES_MAX:
            self._read(False)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, or was told to go."""
        self._is_closing = True
        self.relay.clients.discard(self)
        served, self._served, self._request = self._served, None, None
        if served is not None:
            served.client_lost()
        self._leave(is_well=None)

    def pause_writing(self) -> None:
        """The client reads slower than it is sent."""
        self.is_stalled, self._since_s = True, self.relay.now_s
        if self._served is not None:
            self._served.client_writable(False)

    def resume_writing(self) -> None:
        """It has caught up."""
        self.is_stalled = False
        if self._served is not None:
            self._served.client_writable(True)
        elif self._reader.is_inside:
            self._advance()

    # --- From bytes to requests ------------------------------------------------------------------

    def _advance(self) -> None:
        """Serve what has come, one request at a time."""
        if self._is_advancing:
            return
        self._is_advancing = True
        try:
            while self._request is None and not self._is_closing and not self.is_stalled:
                request = self._reader.take()
                if request is None:
                    self._turn_strangers_away()
                    break
                self._request, self._is_read = request, request.is_whole
                self._is_body_wanted = True
                self._admit(request)
        except FramingError as error:
            self._refuse_connection(error.status, error.message)
        finally:
            self._is_advancing = False
        if self._reader.is_continue_due and not self._is_closing:
            self._reader.is_continue_due = False
            self.transport.write(CONTINUE)

    def _turn_strangers_away(self) -> None:
        """Answer a request whose key is wrong before its body is gathered."""
        head = self._reader.head
        if head is None or head is self._known or not self.relay.is_relayed(head.target):
            return
        self._known = head
        found = self.relay.gate.identify(self.relay.find_authorization(head))
        if isinstance(found, Refusal):
            self.relay.num_refused += 1
            self._refuse_connection(found.status, found.message)

    def _admit(self, request: Request) -> None:
        """Serve a request at once, or when it is its turn, or say why not."""
        relay = self.relay
        if relay.answer_locally(self, request):
            return
        found = relay.gate.arrive(
            relay.find_authorization(request.head),
            relay.clock.now_s(),
            self._decided,
            relay.estimate_tokens(request),
        )
        if isinstance(found, Refusal):
            self._refuse_politely(found)
            return
        self._visit = found
        if found.state is VisitState.ADMITTED:
            self._begin(request)

    def _decided(self, refusal: Refusal | None) -> None:
        """The request that waited may go on, or may not."""
        if refusal is not None:
            self._visit = None
            self._refuse_politely(refusal)
        elif self._request is not None:
            self._begin(self._request)

    def _begin(self, request: Request) -> None:
        relay = self.relay
        self._view = view = relay.view_of(request)
        if relay.cartridges is not None:
            try:
                request = relay.cartridges.fit(request, view)
            except DispatchRefusal as refusal:
                retry_after_s = 1 if refusal.status == 503 else None
                self.refuse(refusal.status, refusal.message, retry_after_s=retry_after_s)
                return
        desk = relay.desk
        if desk is not None and request.is_whole:
            waiting = WaitingForEngine(self, desk, request, view)
            if waiting.begin(relay.clock.now_s()):
                return
        self.relay_request(request, view)

    def relay_request(self, request: Request, view: RequestView) -> None:
        """Send the request that is served to an engine once its prompt has been looked at."""
        if self.relay.is_tokenizing(request):
            WaitingForPrefix(self, request, view).begin()
        else:
            self.send_request(request, view)

    def send_request(self, request: Request, view: RequestView) -> None:
        """Send the request that is served to an engine, or to two of them."""
        if self.relay.handoffs is not None:
            self.relay.handoffs.begin(self, request, view)
            return
        self._served = exchange = Exchange(self, request, view, note=view.note)
        exchange.begin()

    def serve(self, served: Served) -> None:
        """Be busy with something else than an exchange."""
        self._served = served

    def pump(self) -> None:
        """Hand on what came of a body that was not whole when its request was routed."""
        if self._served is None or not self._served.can_take_body or not self._is_body_wanted:
            if self._reader.num_waiting_bytes > PIPELINED_BYTES_MAX:
                self._read(False)
            return
        self._read(True)
        try:
            payload, is_over = self._reader.take_more()
        except FramingError as error:
            self.refuse_body(error.status, error.message)
            return
        self._since_s = self.relay.now_s
        self._is_read = is_over
        if payload or is_over:
            self._served.take_body(payload, is_over)

    def refuse_body(self, status: int, message: str) -> None:
        """Give up a request whose body can't be read on; the engine's connection is closed."""
        served = self._served
        is_answered = served is not None and served.is_answered
        if served is not None:
            served.client_lost()
        # It is the client that did not end what it began.
        self._leave(is_well=None)
        if is_answered:
            self.reset()
        else:
            self._refuse_connection(status, message)

    def read_body(self, is_wanted: bool) -> None:
        """Whether the engine takes more of the body."""
        self._is_body_wanted = is_wanted
        if is_wanted:
            self.pump()
        else:
            self._read(False)

    def _read(self, is_wanted: bool) -> None:
        if is_wanted == self._is_reading or self.transport.is_closing():
            return
        self._is_reading = is_wanted
        if is_wanted:
            self.transport.resume_reading()
        else:
            self.transport.pause_reading()

    # --- The ends of a request -------------------------------------------------------------------

    def exchange_ended(self, keeps: bool, *, is_well: bool = True) -> None:
        """The response is written; serve the next request, or none any more."""
        request, self._request, self._served = self._request, None, None
        self._since_s = self.relay.now_s
        self._leave(is_well=is_well)
        if not keeps or request is None or not self._is_read:
            self._close()
            return
        if not self._is_reading:
            self._read(True)
        if self._reader.is_inside:
            self._advance()

    def answer(self, response: bytes, *, keeps: bool, is_well: bool = True) -> None:
        """Write a whole response of the router's own."""
        self.transport.write(response)
        self.exchange_ended(keeps, is_well=is_well)

    @property
    def keeps(self) -> bool:
        """Whether the connection stays after the request that is served."""
        request = self._request
        return (
            request is not None
            and self._is_read
            and request.head.is_persistent
            and not self.relay.is_draining
        )

    @property
    def is_for_head(self) -> bool:
        """Whether the request that is served is a HEAD."""
        return self._request is not None and self._request.head.method == b"HEAD"

    def refuse(
        self, status: int, message: str, *, retry_after_s: int | None = None, fields: bytes = b""
    ) -> None:
        """Answer the request that is served with an error."""
        if self._view is not None:
            self._view.num_counted = 0
        keeps = self.keeps
        response = error_response(
            status,
            message,
            retry_after_s=retry_after_s,
            fields=fields.decode("ascii"),
            is_persistent=keeps,
            is_for_head=self.is_for_head,
        )
        self.answer(response, keeps=keeps, is_well=status < 500)

    def _refuse_politely(self, refusal: Refusal) -> None:
        self.relay.num_refused += 1
        self.refuse(refusal.status, refusal.message, retry_after_s=refusal.retry_after_s)

    def _refuse_connection(
        self, status: int, message: str, retry_after_s: int | None = None
    ) -> None:
        """Answer bytes that are no request; what follows them can't be understood either."""
        self.relay.num_malformed += status not in (UNAUTHORIZED, UNAVAILABLE)
        response = error_response(status, message, retry_after_s=retry_after_s, is_persistent=False)
        self._request = self._served = None
        self._leave(is_well=status < 500)
        self.transport.write(response)
        self._close()

    def _leave(self, *, is_well: bool | None) -> None:
        """The request is over, if there is one that was let in or waits for that.

        Args:
            is_well: Whether its client was answered with a status below 500; None: it left.
        """
        visit, self._visit = self._visit, None
        view, self._view = self._view, None
        if visit is not None:
            counted = None
            if view is not None:
                counted = view.num_tokens if view.num_counted is None else view.num_counted
            self.relay.gate.leave(visit, self.relay.clock.now_s(), counted)
            self.relay.router.client_ended(is_well=is_well)

    # --- The ends of the connection --------------------------------------------------------------

    def _close(self) -> None:
        """Close once all is written; a client that still sends is listened to for a while."""
        if self._is_closing:
            return
        self._is_closing = True
        if not self._reader.is_inside and self._is_reading:
            self.transport.close()
            return
        self._lingered_bytes, self._since_s = 0, self.relay.now_s
        self._read(True)
        if self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()

    def _discard(self, data: bytes) -> None:
        self._lingered_bytes += len(data)
        if self._lingered_bytes > LINGER_BYTES_MAX:
            self.transport.abort()

    def reset(self) -> None:
        """End the connection so that what was sent can't be mistaken for a whole response."""
        self._is_closing = True
        served, self._request, self._served = self._served, None, None
        if served is not None:
            served.client_lost()
        self._leave(is_well=False)
        sock = self.transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.transport.abort()

    def look(self, now_s: float) -> None:
        """See whether something takes too long."""
        settings, waited_s = self.relay.settings, now_s - self._since_s
        if self._is_closing:
            if waited_s > (LINGER_S if self._lingered_bytes >= 0 else settings.stall_s):
                self.transport.abort()
        elif self.is_stalled:
            if waited_s > settings.stall_s:
                self._leave(is_well=None)
                self.reset()
        elif self._served is not None:
            self._served.look(now_s, settings.upstream_silence_s)
            if not self._is_read and self._is_reading:
                self._look_at_body(waited_s)
        elif self._request is None:
            self._look_at_reading(waited_s)

    def _look_at_reading(self, waited_s: float) -> None:
        settings = self.relay.settings
        if not self._reader.is_inside:
            if waited_s > settings.idle_s:
                self.transport.close()
        elif self._reader.has_head:
            self._look_at_body(waited_s)
        elif waited_s > settings.head_timeout_s:
            self._refuse_connection(408, "the request head took too long")

    def _look_at_body(self, waited_s: float) -> None:
        if waited_s <= self.relay.settings.body_silence_s:
            return
        self.refuse_body(408, "the request body took too long")

    def stop(self, message: str) -> None:
        """The router ends: what runs is told, and the connection closed."""
        if self._served is not None:
            self._served.stop(message)
        elif self._request is not None:
            self.refuse(503, message, retry_after_s=1)
        if not self._is_closing:
            self._is_closing = True
            self.transport.close()
