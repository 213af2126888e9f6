"""What the relay asks about each request: where to, and whether once more."""

from collections.abc import Sequence

import msgspec

from kvkeep.router.cartridges.holders import Holders
from kvkeep.router.health.book import HealthBook, Outcome
from kvkeep.router.limits.bucket import RetryBudget
from kvkeep.router.policies.base import NO_ENDPOINT, Choice, Learns, Needs, Policy
from kvkeep.router.request import RequestView
from kvkeep.router.snapshot import Endpoint, Fleet, Role, Traffic
from kvkeep.router.usage import Usage

TTFT_WEIGHT = 0.1
"""Of the newest time to a first byte in its moving average."""
ATTEMPTS_MAX = 3
"""Endpoints that one request is sent to at most."""


class Ending(msgspec.Struct, frozen=True):
    """How a request ended at an endpoint."""

    outcome: Outcome
    was_answered: bool = False
    """Whether ``first_byte`` was told."""
    request_bytes: int = 0
    """Of the body, as far as it was sent."""
    response_bytes: int = 0
    """As far as they came."""
    usage: Usage | None = None
    """What the response says of its tokens."""


class UnknownModelError(Exception):
    """No endpoint serves the model that a request names."""


class Router:
    """A fleet, the policy that chooses from it, and what comes of the choices.

    The event loop's thread only; nothing here waits.
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        book: HealthBook,
        retries: RetryBudget,
        declared: frozenset[str] = frozenset(),
        *,
        role: Role = Role.SERVE,
        needs: Needs = Needs.NOTHING,
    ) -> None:
        """Have counted nothing.

        Args:
            fleet: All endpoints.
            policy: Chooses from those that may be chosen.
            book: Told how each request ended.
            retries: How many requests may be sent again.
            declared: Models that are known also while no endpoint of theirs is there.
            role: Of the endpoints that may be chosen.
            needs: What others want to know of a request, beside the policy.
        """
        self.fleet, self.policy = fleet, policy
        self._role, self._more_needs = role, needs
        self._declared = declared
        self._book, self._retries = book, retries
        self._learner = policy if isinstance(policy, Learns) else None
        self.holders: Holders | None = None
        """Who has which cartridges in memory; None: that does not count."""
        self.total = Traffic()
        """What clients got: each of their requests once, however often it was tried."""
        self.num_retries = 0
        self._models: frozenset[str] = frozenset()
        self._is_open_to_any = True
        self._is_mixed = False
        self._needs = Needs.NOTHING
        self._version = -1

    @property
    def needs(self) -> Needs:
        """What has to be known of a request before it is routed."""
        self._distinguishes_models()
        return self._needs

    def route(
        self,
        view: RequestView,
        now_s: float,
        tried: Sequence[Endpoint] = (),
        *,
        explain: bool = False,
    ) -> Choice:
        """Choose an endpoint that was not tried.

        Raises:
            UnknownModelError: Endpoints are ready, and none of the fleet has the model.
        """
        if not tried and not explain:
            self._retries.requested()
        ready = self._candidates(view, tried)
        if not ready:
            return NO_ENDPOINT
        if view.cartridge is None or self.holders is None:
            return self.policy.choose(view, ready, now_s, explain=explain)
        narrowed, told = self.holders.narrow(view.cartridge, ready)
        if not explain:
            self.holders.counts[told] += 1
        choice = self.policy.choose(view, narrowed, now_s, explain=explain)
        return msgspec.structs.replace(choice, reason=f"{choice.reason}, cartridge {told}")

    def _candidates(self, view: RequestView, tried: Sequence[Endpoint]) -> Sequence[Endpoint]:
        model = None
        if view.model is not None and self._distinguishes_models():
            # Only names that exist may become keys of the fleet's table.
            model = view.model if view.model in self._models else None
            if model is None and not self._is_open_to_any:
                raise UnknownModelError(view.model)
        ready = self.fleet.ready(self._role, model)
        if tried:
            ready = tuple(endpoint for endpoint in ready if endpoint not in tried)
        return ready

    def _distinguishes_models(self) -> bool:
        """Whether it depends on the model who can serve a request."""
        if self._version != self.fleet.version:
            self._version = self.fleet.version
            served = [endpoint.models for endpoint in self.fleet if endpoint.role is self._role]
            self._models = self._declared.union(*served)
            self._is_open_to_any = not all(served)
            self._is_mixed = len(set(served)) > 1 or bool(self._declared)
            needs = self.policy.needs | self._more_needs
            self._needs = needs | Needs.MODEL if self._is_mixed else needs
        return self._is_mixed

    def may_retry(self, view: RequestView, tried: Sequence[Endpoint]) -> bool:
        """Whether there is another endpoint to try."""
        return len(tried) < ATTEMPTS_MAX and bool(self._candidates(view, tried))

    def take_retry(self, now_s: float) -> bool:
        """Take one retry from the budget."""
        is_allowed = self._retries.take(now_s)
        self.num_retries += is_allowed
        return is_allowed

    def began(self, view: RequestView, choice: Choice, now_s: float) -> int:
        """A request goes to the endpoint of a choice; returns a ticket for ``ended``."""
        endpoint = choice.endpoint
        assert endpoint is not None
        endpoint.num_in_flight += 1
        endpoint.queued_tokens += choice.num_uncached
        if self._learner is not None:
            self._learner.sent(view, choice, now_s)
        return self._book.began(endpoint, now_s)

    def first_byte(self, view: RequestView, choice: Choice, now_s: float, wait_s: float) -> None:
        """The endpoint answers, ``wait_s`` after it was asked."""
        endpoint = choice.endpoint
        assert endpoint is not None
        endpoint.queued_tokens -= choice.num_uncached
        before_s = endpoint.ttft_s
        endpoint.ttft_s = before_s + TTFT_WEIGHT * (wait_s - before_s) if before_s else wait_s
        if self._learner is not None:
            self._learner.first_byte(view, choice, now_s, wait_s)

    def ended(
        self, view: RequestView, choice: Choice, ticket: int, ending: Ending, now_s: float
    ) -> None:
        """The endpoint has nothing to do with the request any more."""
        endpoint, usage = choice.endpoint, ending.usage
        assert endpoint is not None
        endpoint.num_in_flight -= 1
        if not ending.was_answered:
            endpoint.queued_tokens -= choice.num_uncached
        _count_work(endpoint.traffic, ending)
        _count_end(endpoint.traffic, ending.outcome)
        # What is tried elsewhere is counted there.
        if ending.was_answered or ending.outcome is not Outcome.DECLINED:
            _count_work(self.total, ending)
        if self._learner is not None:
            cached_tokens = None if usage is None else usage.cached_tokens
            num_tokens = None if usage is None else usage.prompt_tokens
            self._learner.ended(view, choice, cached_tokens, num_tokens)
        self._book.ended(endpoint, ticket, ending.outcome, now_s)

    def client_ended(self, *, is_well: bool | None) -> None:
        """A client's request is over: answered with a status below 500, or not; None: it left."""
        total = self.total
        if is_well is None:
            total.num_left += 1
        elif is_well:
            total.num_done += 1
        else:
            total.num_failed += 1


def _count_end(traffic: Traffic, outcome: Outcome) -> None:
    if outcome is Outcome.CLIENT_LEFT:
        traffic.num_left += 1
    elif outcome is Outcome.FINISHED:
        traffic.num_done += 1
    else:
        traffic.num_failed += 1


def _count_work(traffic: Traffic, ending: Ending) -> None:
    usage = ending.usage
    traffic.request_bytes += ending.request_bytes
    traffic.response_bytes += ending.response_bytes
    traffic.num_untold += usage is None and ending.outcome is Outcome.FINISHED
    if usage is not None:
        traffic.prompt_tokens += usage.prompt_tokens
        traffic.completion_tokens += usage.completion_tokens
        traffic.cached_tokens += usage.cached_tokens or 0
