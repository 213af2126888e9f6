"""One request and its response: from the choice of an endpoint to the last byte, or to a failure.

What may be tried again: a request whose connection was never made goes to another endpoint; one
that an endpoint answered with 503 before anything else too; and one that was written to a kept
connection which the engine was just closing goes over a new one to the same endpoint. All under the
retry budget, and never once the client has a byte. What an engine may have begun to compute is not
sent to a second one: a request that kills engines would kill them all.
"""

import asyncio

from kvkeep.router.handoff.seam import Asker, Leg, Unanswered
from kvkeep.router.health.book import Outcome, outcome_of
from kvkeep.router.policies.base import Choice
from kvkeep.router.relay.answer import Answer
from kvkeep.router.relay.exchange_state import TRANSITIONS, ExchangeState
from kvkeep.router.relay.framing import CHUNKED, LAST_CHUNK, FramingError, chunk
from kvkeep.router.relay.plain import Pump, plain_response
from kvkeep.router.relay.reader import Request
from kvkeep.router.relay.upstream import EndpointPool, UpstreamConnection
from kvkeep.router.request import RequestView
from kvkeep.router.router import Ending, UnknownModelError
from kvkeep.router.snapshot import Endpoint
from kvkeep.router.usage import Usage, find_usage

OK = 200
BUSY = 503
TAIL_BYTES = 2048
"""Pieces are put together up to so much: an engine may send the end of a response in many."""
PUMPED_AFTER = 4
"""Pieces that passed as they came; then it pays to have the next ones pumped, if that can be."""


class Exchange:
    """The relay's memory of one request; lives until the response is over."""

    __slots__ = (
        "_answer",
        "_before",
        "_choice",
        "_client",
        "_connection",
        "_endpoint",
        "_had_stale",
        "_is_sent",
        "_keeps",
        "_last",
        "_leg",
        "_line",
        "_note",
        "_num_whole",
        "_outcome",
        "_pool",
        "_pump",
        "_received_bytes",
        "_relay",
        "_request",
        "_router",
        "_sent_bytes",
        "_sent_s",
        "_ticket",
        "_tried",
        "_view",
        "_was_answered",
        "is_heard",
        "silent_since_s",
        "state",
    )

    def __init__(
        self,
        client: Asker,
        request: Request,
        view: RequestView,
        leg: Leg | None = None,
        note: str = "",
    ) -> None:
        """Be new; ``begin`` routes it.

        Args:
            client: Who gets the response.
            request: What is asked.
            view: What policies see of it.
            leg: Who decides what is tried again; None: the rules above do.
            note: What else the header X-Kvkeep-Route says, where there is no leg.
        """
        self._client, self._request, self._view = client, request, view
        self._relay = client.relay
        self._leg, self._note = leg, note
        self._router = client.relay.router if leg is None else leg.router
        self._outcome: Outcome | None = None
        self._answer: Answer | None = None
        self._connection: UpstreamConnection | None = None
        self._pool: EndpointPool | None = None
        self._endpoint: Endpoint | None = None
        self._choice: Choice | None = None
        self._was_answered = False
        """Whether the endpoint of the choice has begun to answer."""
        self._sent_bytes = self._received_bytes = 0
        self._before = self._last = b""
        """The last two pieces of the response: near its end it says what it took."""
        self._num_whole = 0
        """Pieces that passed as they came since the last pump."""
        self._pump: Pump | None = None
        """What passes on pieces by itself; None while they come here."""
        self._line = b""
        """The header that says how it was routed."""
        self._ticket = 0
        self._sent_s = 0.0
        self._tried: list[Endpoint] = [] if leg is None else leg.tried
        self._had_stale = False
        self._keeps = False
        """Whether the client's connection stays, as its response's head says."""
        self._is_sent = request.is_whole
        """Whether the engine has, or will have, the whole request."""
        self.state = ExchangeState.NEW
        self.is_heard = False
        """Whether the engine sent anything since the relay looked last."""
        self.silent_since_s = 0.0

    # --- The request -----------------------------------------------------------------------------

    def begin(self) -> None:
        """Choose an endpoint and send the request there."""
        relay = self._relay
        now_s = relay.clock.now_s()
        try:
            choice = self._router.route(self._view, now_s, self._tried)
        except UnknownModelError as error:
            self._fail(404, f"no engine serves the model {str(error)!r}: see /v1/models")
            return
        leg = self._leg
        note = self._note if leg is None else leg.note
        self._line = relay.route_line(choice, self._router.policy.name, note)
        endpoint = choice.endpoint
        if endpoint is None:
            self._refuse(choice)
            return
        self._endpoint, self._choice, self._sent_s = endpoint, choice, now_s
        self._was_answered = False
        self._sent_bytes = self._received_bytes = 0
        self._ticket = self._router.began(self._view, choice, now_s)
        if leg is not None:
            leg.chosen(endpoint)
        self._pool = relay.pool_of(endpoint)
        connection = self._pool.take()
        if connection is None:
            self._connect(self._pool)
        else:
            self._send(connection)

    def _move(self, state: ExchangeState) -> None:
        assert state in TRANSITIONS[self.state], f"{self.state.name} -> {state.name}"
        self.state = state

    def _connect(self, pool: EndpointPool) -> None:
        self._move(ExchangeState.CONNECTING)
        task = asyncio.get_running_loop().create_task(pool.open())
        self._relay.connecting.add(task)
        task.add_done_callback(self._connected)

    def _connected(self, task: "asyncio.Task[UpstreamConnection]") -> None:
        self._relay.connecting.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if self.state is not ExchangeState.CONNECTING:
            # The client left meanwhile; the connection may serve the next one.
            if error is None and self._pool is not None:
                self._pool.give_back(task.result(), self._relay.now_s)
            return
        if error is None:
            self._send(task.result())
            return
        is_late = isinstance(error, TimeoutError)
        self._ended(Outcome.TIMEOUT if is_late else Outcome.UNREACHABLE)
        self._try_elsewhere(504 if is_late else 502, "the engine could not be reached")

    def _send(self, connection: UpstreamConnection) -> None:
        request = self._request
        self._connection, connection.listener, self._answer = connection, self, None
        self._move(ExchangeState.SENT)
        self.silent_since_s = self._relay.now_s
        self._sent_bytes = len(request.body)
        connection.transport.write(request.wire or request.framed())
        if self._leg is not None:
            self._leg.began()
        if not request.is_whole:
            self._client.pump()

    def take_body(self, payload: bytes, is_over: bool) -> None:
        """More of the body of a request that was not whole when it was routed."""
        if self._connection is None or self.state is ExchangeState.OVER:
            return
        self._is_sent = is_over
        self._sent_bytes += len(payload)
        if self._request.head.length == CHUNKED:
            payload = chunk(payload) + (LAST_CHUNK if is_over else b"")
        if payload:
            self._connection.transport.write(payload)
        self.silent_since_s = self._relay.now_s

    @property
    def can_take_body(self) -> bool:
        """Whether more of the body has a place to go."""
        return self._connection is not None and not self._is_sent

    @property
    def is_answered(self) -> bool:
        """Whether the client has the beginning of a response."""
        return self.state is ExchangeState.ANSWERING

    # --- The response ----------------------------------------------------------------------------

    def upstream_data(self, data: bytes) -> None:
        """The engine sent bytes."""
        self.is_heard = True
        self._received_bytes += len(data)
        answer = self._answer
        if answer is None and self._pass_whole(data):
            return
        if len(self._last) + len(data) <= TAIL_BYTES:
            self._last += data
        else:
            self._before, self._last = self._last, data
        if answer is None:
            asked = self._request.head
            answer = Answer(is_for_head=asked.method == b"HEAD", is_for_old=asked.is_old)
            self._answer = answer
        try:
            if self.state is ExchangeState.ANSWERING:
                out = answer.take(data)
            else:
                out = self._begin_answer(answer, data)
        except FramingError as error:
            self._broken(error.message)
            return
        if out:
            self._client.transport.write(out)
        if answer.is_over and self.state is ExchangeState.ANSWERING:
            self._finish_answer(answer)
        elif out is data:
            self._num_whole += 1
            if self._num_whole % PUMPED_AFTER == 0 and answer.can_be_pumped and self._is_sent:
                self._begin_pump(answer)

    def _begin_pump(self, answer: Answer) -> None:
        relay, connection = self._relay, self._connection
        assert connection is not None
        if relay.num_pumps < relay.pumps_max:
            self._pump = connection.begin_pump(self._client.transport, answer.can_be_mended)
            relay.num_pumps += self._pump is not None

    def pump_ended(self, unsent: bytes) -> None:
        """Pieces come here again; the client did not take these bytes of what was passed on."""
        self._take_over()
        if unsent:
            self._client.transport.write(unsent)

    def _take_over(self) -> None:
        """Know what a pump has seen, if there was one."""
        pump, self._pump = self._pump, None
        if pump is None:
            return
        self._num_whole = 0
        self._relay.num_pumps -= 1
        self._received_bytes += pump.num_bytes
        self.is_heard = self.is_heard or pump.is_heard
        self._before, self._last = self._last, pump.tail

    def _begin_answer(self, answer: Answer, data: bytes) -> bytes:
        found = answer.find_head(data)
        if found is None:
            return b""
        interim, rest = found
        head = answer.head
        if head is None:
            return interim
        if head.status == BUSY and not interim and self._goes_elsewhere():
            self._leave_upstream()
            self._ended(Outcome.DECLINED)
            if self._leg is None:
                self.begin()
            else:
                self._fail(BUSY, "the engine is busy", head.retry_after_s)
            return b""
        out = interim + answer.head_bytes(self._first_byte())
        if head.length == 0:
            answer.is_over = True
            answer.is_exact = not rest
        elif rest:
            try:
                out += answer.take(rest)
            except FramingError:
                # What tells the client of the error goes behind the head.
                self._client.transport.write(out)
                raise
        return out

    def _pass_whole(self, data: bytes) -> bool:
        """Pass on a whole plain response, as most are; returns whether it was one."""
        if plain_response is None or self._request.head.method == b"HEAD":
            return False
        plain = plain_response(data)
        if plain is None:
            return False
        status, length, _, end = plain
        if end + length != len(data) or status == BUSY:
            return False
        end -= 2
        self._last = data
        self._client.transport.write(b"".join((data[:end], self._first_byte(), data[end:])))
        self._finish(status, is_reusable=True)
        return True

    def _first_byte(self) -> bytes:
        """The endpoint answers; returns what is added to the head."""
        choice = self._choice
        assert choice is not None
        now_s = self._relay.clock.now_s()
        self._was_answered = True
        self._router.first_byte(self._view, choice, now_s, now_s - self._sent_s)
        if self._leg is not None:
            self._leg.answered()
        self._keeps = self._keeps_client()
        self._move(ExchangeState.ANSWERING)
        return self._line if self._keeps else self._line + b"Connection: close\r\n"

    def _keeps_client(self) -> bool:
        """Whether the client's connection can serve another request after this one."""
        asked = self._request.head
        return (
            asked.is_persistent  # and so no HTTP/1.0, whose chunks would end with the connection
            and self._is_sent
            and not self._relay.is_draining
        )

    def _finish_answer(self, answer: Answer) -> None:
        head = answer.head
        assert head is not None
        self._finish(head.status, is_reusable=head.is_persistent and answer.is_exact)

    def _finish(self, status: int, *, is_reusable: bool) -> None:
        connection, pool = self._connection, self._pool
        assert connection is not None
        assert pool is not None
        self._connection = None
        if self._client.is_stalled:
            connection.transport.resume_reading()
        if is_reusable and self._is_sent:
            pool.give_back(connection, self._relay.now_s)
        else:
            connection.abort()
        self._move(ExchangeState.OVER)
        usage = find_usage(self._before, self._last) if status == OK else None
        num_tokens = None if usage is None else usage.prompt_tokens
        self._view.answered(num_tokens, is_error=status != OK)
        self._ended(outcome_of(status), usage)
        self._client.exchange_ended(self._keeps, is_well=status < 500)

    # --- Failures --------------------------------------------------------------------------------

    def upstream_lost(self, error: Exception | None) -> None:
        """The connection to the engine is over."""
        self._take_over()
        connection, self._connection = self._connection, None
        answer, pool = self._answer, self._pool
        assert connection is not None
        assert pool is not None
        if self.state is ExchangeState.ANSWERING:
            assert answer is not None
            if answer.is_ended_by_close and error is None:
                self._client.transport.write(answer.end())
                self._connection = connection
                self._finish_answer(answer)
                return
            self._broken("the engine broke off its response")
            return
        if connection.is_reused and not self._had_stale and self._can_repeat():
            # Engines close idle connections; this request crossed such an end on its way.
            self._had_stale = True
            self._connect(pool)
            return
        self._broken("the engine closed the connection without a response")

    def _can_repeat(self) -> bool:
        return self._request.is_whole and self._answer is None

    def _goes_elsewhere(self) -> bool:
        """Whether a busy endpoint's answer is dropped: a leg decides then, or another is asked."""
        return self._request.is_whole and (self._leg is not None or self._take_retry())

    def _take_retry(self) -> bool:
        """Whether another endpoint is to be asked; that is taken from the budget."""
        router, endpoint = self._relay.router, self._endpoint
        assert endpoint is not None
        self._tried.append(endpoint)
        may_retry = router.may_retry(self._view, self._tried)
        return may_retry and router.take_retry(self._relay.clock.now_s())

    def _try_elsewhere(self, status: int, message: str) -> None:
        """Nobody works on the request; ``_ended`` was called."""
        if self._leg is None and self._take_retry():
            self.begin()
        else:
            self._fail(status, message)

    def _broken(self, message: str, status: int = 502, outcome: Outcome = Outcome.BROKEN) -> None:
        """The endpoint failed while it had the request."""
        self._leave_upstream()
        self._ended(outcome)
        if self.state is not ExchangeState.ANSWERING:
            self._fail(status, message)
            return
        answer, client = self._answer, self._client
        assert answer is not None
        self._move(ExchangeState.OVER)
        if answer.can_be_mended:
            client.transport.write(answer.mend(status, message))
            client.exchange_ended(False, is_well=False)
        else:
            # The end of the connection must not look like the end of the body.
            client.reset()

    def _refuse(self, choice: Choice) -> None:
        if self._tried:
            self._fail(502, "no other engine could be reached")
        else:
            self._fail(BUSY, f"{choice.reason}: try again later", retry_after_s=1)

    def _fail(self, status: int, message: str, retry_after_s: int | None = None) -> None:
        """Say so to a client that has nothing yet."""
        self._move(ExchangeState.OVER)
        if self._leg is not None:
            self._leg.failed(Unanswered(status, message, self._outcome, retry_after_s))
            return
        self._client.refuse(status, message, retry_after_s=retry_after_s, fields=self._line)

    def _ended(self, outcome: Outcome, usage: Usage | None = None) -> None:
        relay, choice = self._relay, self._choice
        assert choice is not None
        ending = Ending(outcome, self._was_answered, self._sent_bytes, self._received_bytes, usage)
        self._outcome = outcome
        self._router.ended(self._view, choice, self._ticket, ending, relay.clock.now_s())
        if self._leg is not None:
            self._leg.ended(outcome)

    def _leave_upstream(self) -> None:
        self._take_over()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()

    # --- What the client and the clock say ----------------------------------------------------

    def upstream_writable(self, is_writable: bool) -> None:
        """The engine takes less of the body than came, or has caught up."""
        self._client.read_body(is_writable)

    def client_writable(self, is_writable: bool) -> None:
        """The client reads slower than the engine sends, or has caught up."""
        if self._connection is None:
            return
        if is_writable:
            self.is_heard = True
            self._connection.transport.resume_reading()
        else:
            self._connection.transport.pause_reading()

    def client_lost(self) -> None:
        """The client left: the engine is told by the end of its connection, and nobody answers."""
        self.cancel(Outcome.CLIENT_LEFT)

    def cancel(self, outcome: Outcome) -> None:
        """Give up, for this reason; neither client nor leg are told of a failure."""
        if self.state is ExchangeState.OVER:
            return
        had_endpoint = self.state is not ExchangeState.NEW
        self._leave_upstream()
        self._move(ExchangeState.OVER)
        if had_endpoint:
            self._ended(outcome)

    def look(self, now_s: float, silence_s_max: float) -> None:
        """Give up on an engine that says nothing for too long."""
        if self._pump is not None and self._pump.is_heard:
            self._pump.is_heard, self.is_heard = False, True
        if self.is_heard:
            self.is_heard, self.silent_since_s = False, now_s
        elif self.state in (ExchangeState.SENT, ExchangeState.ANSWERING):
            is_late = now_s - self.silent_since_s > silence_s_max
            if is_late and not self._client.is_stalled:
                self._broken("the engine said nothing for too long", 504, Outcome.TIMEOUT)

    def stop(self, message: str) -> None:
        """The router ends before the engine does."""
        if self.state is ExchangeState.NEW:
            self._fail(BUSY, message)
        elif self.state is not ExchangeState.OVER:
            self._broken(message, BUSY, Outcome.CLIENT_LEFT)
