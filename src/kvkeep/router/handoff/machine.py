"""One request's hand-off: what happened in, what to do next out. Pure; told the time.

    PLANNED -> PREFILL_SENT -> OFFERED -> DECODE_SENT -> ANSWERING -> DONE

From each of the first five it ends in FAILED (an error was answered) or ABORTED (the client left),
and each of the middle three may lead back: to another prefill engine, or to a decode engine that
computes the prompt itself, if that is wanted.

What is offered belongs to somebody at any time. An offer is *given* with the decode engine that is
sent to fetch it: from then on that engine tells the prefill engine when it is done, also when it
refuses the request or its client leaves. One that is not given is released. One whose decode engine
broke down is left to its lease: a decode engine that only looks dead may still be reading, and must
not read what the blocks are used for next.
"""

import math
from collections import deque
from dataclasses import dataclass
from enum import Enum

from kvkeep.router.handoff.settings import HandOffSettings


class HandOffState(Enum):
    """How far a hand-off is."""

    PLANNED = "planned"
    PREFILL_SENT = "prefill_sent"
    OFFERED = "offered"
    """The prefill engine answered; it keeps the blocks under a lease."""
    DECODE_SENT = "decode_sent"
    ANSWERING = "answering"
    """The client has the beginning of the decode engine's response."""
    DONE = "done"
    FAILED = "failed"
    ABORTED = "aborted"

    __hash__ = object.__hash__  # members are singletons; Enum's own hash is a call of Python


S = HandOffState
HISTORY_MAX = 32
"""States of one request: with all attempts allowed, it has fewer."""
ENDS = frozenset({S.DONE, S.FAILED, S.ABORTED})
TRANSITIONS: dict[HandOffState, frozenset[HandOffState]] = {
    S.PLANNED: frozenset({S.PREFILL_SENT, S.FAILED, S.ABORTED}),
    S.PREFILL_SENT: frozenset({S.PREFILL_SENT, S.OFFERED, S.DECODE_SENT, S.FAILED, S.ABORTED}),
    S.OFFERED: frozenset({S.PREFILL_SENT, S.DECODE_SENT, S.FAILED, S.ABORTED}),
    S.DECODE_SENT: frozenset({S.PREFILL_SENT, S.DECODE_SENT, S.ANSWERING, S.FAILED, S.ABORTED}),
    S.ANSWERING: frozenset({S.DONE, S.FAILED, S.ABORTED}),
    S.DONE: frozenset(),
    S.FAILED: frozenset(),
    S.ABORTED: frozenset(),
}
"""The legal moves; anything else is a defect of kvkeep."""


class FailureKind(Enum):
    """Why a leg failed."""

    NO_ENDPOINT = "no_endpoint"
    """No endpoint of its role is ready that was not tried."""
    NO_RETRY = "no_retry"
    """The retry budget is used up."""
    UNREACHABLE = "unreachable"
    """No connection: the engine never had the request."""
    BUSY = "busy"
    """It answered 503."""
    ERROR = "error"
    """It answered with a 5xx that means a fault."""
    BROKEN = "broken"
    """Its connection ended before its answer, or its answer is none."""
    TIMEOUT = "timeout"
    """It said nothing in time."""
    EXPIRED = "expired"
    """The lease of what was offered ran low before a decode engine had the request."""
    NO_OFFER = "no_offer"
    """A prefill's answer offers no blocks: the engine has no connector that could."""


_SAYS_NOTHING = frozenset({FailureKind.NO_ENDPOINT, FailureKind.NO_RETRY})
"""After an earlier failure, that one is worth more to whoever reads the error."""


@dataclass(frozen=True, slots=True)
class Failure:
    """How a leg failed, and what to tell a client of it."""

    kind: FailureKind
    status: int
    message: str


@dataclass(frozen=True, slots=True)
class SendPrefill:
    """Send the prompt to a prefill engine that was not tried."""

    attempt: int
    """1 for the first; a further one takes from the retry budget."""


@dataclass(frozen=True, slots=True)
class SendDecode:
    """Send the request to a decode engine that was not tried."""

    attempt: int
    """1 for the first; a further one takes from the retry budget."""
    offer: bytes | None
    """What the prefill engine offers, as JSON; None: the decode engine computes the prompt."""


@dataclass(frozen=True, slots=True)
class CancelPrefill:
    """Give the prefill leg up; nothing of it is reported any more."""

    is_late: bool
    """Whether it is the engine's fault."""


@dataclass(frozen=True, slots=True)
class CancelDecode:
    """Give the decode leg up; nothing of it is reported any more."""

    is_late: bool


@dataclass(frozen=True, slots=True)
class ReleaseOffer:
    """Nobody will fetch these blocks: have the prefill engine free them before their lease ends."""

    offer: bytes


@dataclass(frozen=True, slots=True)
class RelayFallback:
    """Count and show that the decode engine computes the prompt, and why."""

    label: str


@dataclass(frozen=True, slots=True)
class Answer:
    """Tell the client that it failed."""

    status: int
    message: str


@dataclass(frozen=True, slots=True)
class PassOn:
    """Give the client what the prefill engine answered: its refusal, a 4xx."""


Action = (
    SendPrefill
    | SendDecode
    | CancelPrefill
    | CancelDecode
    | ReleaseOffer
    | RelayFallback
    | Answer
    | PassOn
)
Actions = tuple[Action, ...]


class HandOff:
    """The hand-off of one request.

    Each Send is followed by exactly one report of ``_failed``, or by the others in their order,
    until it is cancelled. What comes out of turn all the same is ignored, but for an offer: nobody
    wants it, so it is released. After the end nothing but that comes out.
    """

    __slots__ = (
        "_decodes",
        "_failure",
        "_is_given",
        "_is_reusable",
        "_lease_end_s",
        "_lease_s",
        "_offer",
        "_prefills",
        "_settings",
        "_since_s",
        "deadline_s",
        "fallback",
        "history",
        "is_empty",
        "is_refused",
        "state",
    )

    def __init__(
        self, settings: HandOffSettings, now_s: float, *, lease_s: float, is_reusable: bool
    ) -> None:
        """Be planned.

        Args:
            settings: Limits, and whether to fall back.
            now_s: Monotonic time.
            lease_s: How long an offer lasts from its answer on; ``math.inf``: as long as needed.
            is_reusable: Whether several decode engines may fetch one offer, one after the other.
        """
        self._settings, self._lease_s, self._is_reusable = settings, lease_s, is_reusable
        self._prefills = self._decodes = 0
        self._offer: bytes | None = None
        self._is_given = False
        """Whether a decode engine has been told of the offer, or of the request without one."""
        self._lease_end_s = math.inf
        self._failure: Failure | None = None
        """The last that says something."""
        self._since_s = now_s
        self.state = S.PLANNED
        self.deadline_s = math.inf
        """When ``tick`` has something to do; infinity where only the relay's own limits count."""
        self.fallback = ""
        """Why a decode engine computes the prompt; empty while none does."""
        self.is_empty = False
        """Whether the prompt has nothing to hand over; the decode engine computes it then."""
        self.is_refused = False
        """Whether the prefill engine said that the request is wrong."""
        self.history: deque[tuple[HandOffState, float]] = deque(maxlen=HISTORY_MAX)
        """States that are over, with their seconds."""

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in ENDS

    def _move(self, state: HandOffState, now_s: float, deadline_s: float = math.inf) -> None:
        assert state in TRANSITIONS[self.state], f"{self.state.name} -> {state.name}"
        self.history.append((self.state, now_s - self._since_s))
        self.state, self._since_s, self.deadline_s = state, now_s, deadline_s

    # --- The prefill leg --------------------------------------------------------------------------

    def begin(self, now_s: float) -> Actions:
        """Go."""
        return self._prefill(now_s) if self.state is S.PLANNED else ()

    def _prefill(self, now_s: float) -> Actions:
        self._prefills += 1
        self._move(S.PREFILL_SENT, now_s, now_s + self._settings.prefill_timeout_s)
        return (SendPrefill(self._prefills),)

    @property
    def _may_prefill(self) -> bool:
        return self._prefills < self._settings.prefill_attempts

    def prefill_answered(self, offer: bytes, now_s: float) -> Actions:
        """The prefill engine is done and offers blocks."""
        if self.state is not S.PREFILL_SENT:
            return (ReleaseOffer(offer),)
        self._offer, self._lease_end_s = offer, now_s + self._lease_s
        self._move(S.OFFERED, now_s, self._lease_end_s - self._settings.offer_margin_s)
        return self._decode(now_s)

    def prefill_empty(self, now_s: float) -> Actions:
        """The prefill engine is done, and the prompt has nothing that could be handed over."""
        if self.state is not S.PREFILL_SENT:
            return ()
        self.is_empty = True
        return self._send_decode(None, now_s)

    def prefill_refused(self, now_s: float) -> Actions:
        """The prefill engine says that the request is wrong; so would any other."""
        if self.state is not S.PREFILL_SENT:
            return ()
        self.is_refused = True
        self._move(S.FAILED, now_s)
        return (PassOn(),)

    def prefill_failed(self, failure: Failure, now_s: float) -> Actions:
        """The prefill leg is over and offered nothing."""
        if self.state is not S.PREFILL_SENT:
            return ()
        self._note(failure)
        if self._may_prefill and failure.kind not in _SAYS_NOTHING:
            return self._prefill(now_s)
        return self._fall_back("prefill", now_s)

    # --- The decode leg ---------------------------------------------------------------------------

    def _decode(self, now_s: float) -> Actions:
        """Send the request with the offer, which is nobody's, if it lasts long enough."""
        assert self._offer is not None
        if self._lease_end_s - now_s < self._settings.offer_margin_s:
            return self._lease_ran_low(now_s)
        return self._send_decode(self._offer, now_s)

    def _send_decode(self, offer: bytes | None, now_s: float) -> Actions:
        self._decodes += 1
        self._offer, self._is_given = offer, False
        self._move(S.DECODE_SENT, now_s, now_s + self._settings.decode_timeout_s)
        return (SendDecode(self._decodes, offer),)

    def _lease_ran_low(self, now_s: float) -> Actions:
        released = self._release()
        self._note(Failure(FailureKind.EXPIRED, 504, "no decode engine took the prefill in time"))
        if self._may_prefill:
            return (*released, *self._prefill(now_s))
        return (*released, *self._fall_back("offer", now_s))

    def _release(self) -> Actions:
        """Have the offer given up, if there is one that no decode engine was told of."""
        offer, self._offer = self._offer, None
        return () if offer is None or self._is_given else (ReleaseOffer(offer),)

    def decode_began(self) -> None:
        """A decode engine has the request, or its beginning; the offer is its business now."""
        if self.state is S.DECODE_SENT:
            self._is_given = True

    def decode_failed(self, failure: Failure, now_s: float) -> Actions:
        """The decode leg is over and the client has nothing of it."""
        if self.state is not S.DECODE_SENT:
            return ()
        self._note(failure)
        may_repeat = (
            failure.kind not in _SAYS_NOTHING and self._decodes < self._settings.decode_attempts
        )
        # What an engine may have begun to compute is not sent to the next one as it is: a request
        # that kills engines would kill them all.
        is_untouched = not self._is_given or failure.kind is FailureKind.BUSY
        if self._offer is None:
            if may_repeat and is_untouched:
                return self._send_decode(None, now_s)
            return self._fail(now_s)
        if may_repeat and is_untouched and (self._is_reusable or not self._is_given):
            return self._decode(now_s)
        released = self._release()
        if may_repeat and is_untouched and self._may_prefill:
            return (*released, *self._prefill(now_s))
        if may_repeat:
            return (*released, *self._fall_back("decode", now_s))
        return (*released, *self._fail(now_s))

    def decode_answered(self, now_s: float) -> None:
        """The client gets the beginning of the response: from here on nothing is tried again."""
        if self.state is S.DECODE_SENT:
            self._move(S.ANSWERING, now_s)

    def decode_ended(self, *, is_well: bool, now_s: float) -> None:
        """The response is over, whole or broken off."""
        if self.state is S.ANSWERING:
            self._move(S.DONE if is_well else S.FAILED, now_s)

    # --- Ends -------------------------------------------------------------------------------------

    def _note(self, failure: Failure) -> None:
        if self._failure is None or failure.kind not in _SAYS_NOTHING:
            self._failure = failure

    def _fall_back(self, leg: str, now_s: float) -> Actions:
        """Nothing is offered or given any more: have a decode engine do it all, if that is wanted.

        Args:
            leg: Which part did not come off.
            now_s: Monotonic time.
        """
        if self._settings.fallback == "none" or self.fallback:
            return self._fail(now_s)
        assert self._failure is not None
        self.fallback = f"{leg}_{self._failure.kind.value}"
        return (RelayFallback(self.fallback), *self._send_decode(None, now_s))

    def _fail(self, now_s: float) -> Actions:
        assert self._failure is not None
        self._move(S.FAILED, now_s)
        return (Answer(self._failure.status, self._failure.message),)

    def client_left(self, now_s: float) -> Actions:
        """Nobody waits any more."""
        if self.is_over:
            return ()
        cancelled = self._cancel(is_late=False)
        self._move(S.ABORTED, now_s)
        return cancelled

    def _cancel(self, *, is_late: bool) -> Actions:
        """Give up what runs, and what is held for it."""
        if self.state is S.PREFILL_SENT:
            return (CancelPrefill(is_late),)
        if self.state in (S.DECODE_SENT, S.ANSWERING):
            return (CancelDecode(is_late), *self._release())
        return self._release()

    def stop(self, message: str, now_s: float) -> Actions:
        """The router ends; a response that has begun is ended by the relay."""
        if self.is_over or self.state is S.ANSWERING:
            return ()
        cancelled = self._cancel(is_late=False)
        self._move(S.FAILED, now_s)
        return (*cancelled, Answer(503, message))

    def tick(self, now_s: float) -> Actions:
        """Time has passed."""
        if now_s < self.deadline_s:
            return ()
        if self.state is S.OFFERED:
            return self._lease_ran_low(now_s)
        name = "prefill" if self.state is S.PREFILL_SENT else "decode"
        late = Failure(FailureKind.TIMEOUT, 504, f"the {name} engine did not answer in time")
        if self.state is S.PREFILL_SENT:
            return (CancelPrefill(is_late=True), *self.prefill_failed(late, now_s))
        return (CancelDecode(is_late=True), *self.decode_failed(late, now_s))
