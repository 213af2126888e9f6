"""What a request passes before it is routed: its key, its key's rates, and room.

Pure but for callbacks: the relay tells the time, calls ``tick`` when ``next_deadline_s`` is over,
and is told when a request that waited may go on or may not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Annotated

import msgspec

from kvkeep.router.limits.admission import AdmissionQueue, Visit, VisitState
from kvkeep.router.limits.bucket import TokenBucket
from kvkeep.router.limits.keys import ApiKey, KeyRing

REFUSALS = {
    "invalid_api_key": "requests without a key that is known (401)",
    "rate_limit_exceeded": "requests beyond the rate of their key (429)",
    "token_limit_exceeded": "requests beyond the rate of prompt tokens of their key (429)",
    "concurrency_limit_exceeded": "requests beyond what their key may have in flight (429)",
    "queue_full": "requests for which there was no place to wait (503)",
    "queue_timeout": "requests that waited too long for their turn (503)",
    "draining": "requests that came after the router was told to stop (503)",
}
"""Code to help text."""
ANYONE = ""
"""The holder of every request where no keys are asked for."""
MINUTE_S = 60
DRAINING_RETRY_AFTER_S = 1
"""By then another router, or this one's successor, has the address."""


class LimitSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How much is taken on."""

    in_flight_max: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 1024
    """Requests that run at one time, over all engines; 0: no limit."""
    queue_max: Annotated[int, msgspec.Meta(ge=0, le=65_536)] = 1024
    """Requests that wait for their turn; what is beyond is refused with 503."""
    queue_wait_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 10.0
    """Seconds that a request waits at most; then it is refused with 503."""
    keys_file: str = ""
    """YAML list of API keys (mode 0600); empty: everybody may ask, and an ``Authorization`` header
    is the engines' business."""
    retry_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.1
    """Share of the requests that may be sent to a second engine."""
    retry_min_per_s: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 1.0
    """Retries each second that are always there, for when there are few requests."""
    retry_burst: Annotated[float, msgspec.Meta(ge=1, le=10_000)] = 20.0
    """Retries at once: those whose engine just died."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not served."""

    status: int
    """Of HTTP."""
    code: str
    """One of `REFUSALS`."""
    message: str
    """For a person: what to do."""
    retry_after_s: int | None = None
    """For the header ``Retry-After``; None where trying again changes nothing."""


UNKNOWN_KEY = Refusal(
    401,
    "invalid_api_key",
    "No known API key was given: send one of this router's as 'Authorization: Bearer KEY'.",
)

Decided = Callable[[Refusal | None], None]
"""Told once what became of a request that waited; None: it may go on."""


class Gate:
    """Lets requests in, has them wait, or says why not."""

    def __init__(self, settings: LimitSettings, keys: KeyRing | None) -> None:
        """Be open; without keys nobody is asked for one."""
        self._keys = keys
        self._queue = AdmissionQueue(
            settings.in_flight_max, settings.queue_max, settings.queue_wait_s
        )
        self._requests: dict[str, TokenBucket] = {}
        self._prompts: dict[str, TokenBucket] = {}
        """Of prompt tokens; both by the key's name, of keys with such a limit."""
        self._waiting: dict[Visit, Decided] = {}
        self._is_draining = False
        self.num_refused = dict.fromkeys(REFUSALS, 0)

    @property
    def num_running(self) -> int:
        """Requests that were let in and have not ended."""
        return self._queue.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their turn."""
        return self._queue.num_waiting

    @property
    def next_deadline_s(self) -> float | None:
        """When to call ``tick``; None while nobody waits."""
        return self._queue.next_deadline_s

    def identify(self, authorization: bytes | None) -> ApiKey | Refusal | None:
        """Whose request it is: for what costs an engine nothing, such as the list of models.

        Returns:
            The key, why there is none, or None where nobody is asked for one.
        """
        if self._keys is None:
            return None
        return self._keys.find(authorization) or self._refused(UNKNOWN_KEY)

    def arrive(
        self,
        authorization: bytes | None,
        now_s: float,
        decided: Decided,
        num_tokens: int = 0,
    ) -> Visit | Refusal:
        """A request that wants an engine came.

        Args:
            authorization: Value of its header; None if it has none.
            now_s: Monotonic time.
            decided: Told later if the visit is WAITING: exactly once, unless it left before.
            num_tokens: About how many its prompt has.

        Returns:
            A visit, ADMITTED or WAITING, to be given back with ``leave`` exactly once whatever
            becomes of it; or why there is none.
        """
        if self._is_draining:
            return self._refused(_unavailable("draining", DRAINING_RETRY_AFTER_S))
        visit = Visit(ANYONE)
        if self._keys is not None:
            key = self.identify(authorization)
            if isinstance(key, Refusal):
                return key
            if key is not None:
                visit.holder, visit.num_tokens = key.name, num_tokens
                if (beyond := self._beyond_limits(key, num_tokens, now_s)) is not None:
                    return self._refused(beyond)
        pushed = self._queue.arrive(visit, now_s)
        if visit.state is VisitState.REFUSED:
            self._count(visit, 0, now_s)
            return self._refused(_unavailable(visit.why, self._queue.retry_after_s()))
        if visit.state is VisitState.WAITING:
            self._waiting[visit] = decided
        if pushed:
            self._tell_refused(pushed, now_s)
        return visit

    def leave(self, visit: Visit, now_s: float, num_tokens: int | None = None) -> None:
        """A request ended, or its client went; who waits may be told within this call.

        Args:
            visit: Of the request.
            now_s: Monotonic time.
            num_tokens: How many its prompt had, as whoever answered counted them; 0 if nobody
                did, None if nobody said.
        """
        if visit.state is VisitState.WAITING:
            num_tokens = 0
        if num_tokens is not None:
            self._count(visit, num_tokens, now_s)
        if self._waiting:
            self._waiting.pop(visit, None)
        for admitted in self._queue.leave(visit, now_s):
            self._waiting.pop(admitted)(None)

    def tick(self, now_s: float) -> None:
        """Refuse whoever waited too long."""
        self._tell_refused(self._queue.expire(now_s), now_s)

    def drain(self) -> None:
        """Let nobody in any more; who waits is still served in turn."""
        self._is_draining = True

    def _count(self, visit: Visit, num_tokens: int, now_s: float) -> None:
        """Put right what was taken for a prompt."""
        prompts = self._prompts.get(visit.holder)
        if prompts is not None:
            prompts.put_back(visit.num_tokens - num_tokens, now_s)

    def _beyond_limits(self, key: ApiKey, num_tokens: int, now_s: float) -> Refusal | None:
        if key.in_flight_max and self._queue.num_present(key.name) >= key.in_flight_max:
            return _limited(
                "concurrency_limit_exceeded",
                f"This key may have {key.in_flight_max} requests at one time: wait for one to end.",
                self._queue.retry_after_s(),
            )
        per_min = key.prompt_tokens_per_min
        requests = _bucket(
            self._requests, key.name, key.requests_per_s, key.burst or key.requests_per_s
        )
        prompts = _bucket(
            self._prompts, key.name, per_min / MINUTE_S, key.prompt_tokens_burst or per_min
        )
        if requests is not None and (wait_s := requests.wait_s(now_s)):
            return _limited(
                "rate_limit_exceeded",
                f"This key may send {key.requests_per_s:g} requests each second: send fewer.",
                max(1, ceil(wait_s)),
            )
        if prompts is not None and (wait_s := prompts.wait_s(now_s, num_tokens)):
            return _limited(
                "token_limit_exceeded",
                f"This key may send {per_min:g} prompt tokens each minute, and this prompt has "
                f"about {num_tokens}: send fewer.",
                max(1, ceil(wait_s)),
            )
        # Nothing is taken of one rate for a request that the other one refuses.
        if requests is not None:
            requests.take(now_s)
        if prompts is not None:
            prompts.take(now_s, num_tokens)
        return None

    def _tell_refused(self, visits: Sequence[Visit], now_s: float) -> None:
        for visit in visits:
            self._count(visit, 0, now_s)
            refusal = _unavailable(visit.why, self._queue.retry_after_s())
            self._waiting.pop(visit)(self._refused(refusal))

    def _refused(self, refusal: Refusal) -> Refusal:
        self.num_refused[refusal.code] += 1
        return refusal


def _bucket(
    known: dict[str, TokenBucket], name: str, rate_per_s: float, burst: float
) -> TokenBucket | None:
    """The bucket of a key, made at first use; None without a rate."""
    if not rate_per_s:
        return None
    found = known.get(name)
    if found is None:
        found = known[name] = TokenBucket(rate_per_s, max(1.0, burst))
    return found


_UNAVAILABLE = {
    "queue_full": "Too many requests wait for an engine: try again later.",
    "queue_timeout": "No engine was free in time: try again later.",
    "draining": "This router is stopping: try again, elsewhere if you can.",
}


def _unavailable(code: str, retry_after_s: int) -> Refusal:
    return Refusal(503, code, _UNAVAILABLE[code], retry_after_s)


def _limited(code: str, message: str, retry_after_s: int) -> Refusal:
    return Refusal(429, code, message, retry_after_s)
