"""What the relay asks about each request: where to, and whether once more."""

from collections.abc import Sequence

from kvkeep.router.health.book import FAILURES, HealthBook, Outcome
from kvkeep.router.limits.bucket import RetryBudget
from kvkeep.router.policies.base import NO_ENDPOINT, Choice, Needs, Policy
from kvkeep.router.request import RequestView
from kvkeep.router.snapshot import Endpoint, Fleet, Role

TTFT_WEIGHT = 0.1
"""Of the newest time to a first byte in its moving average."""
ATTEMPTS_MAX = 3
"""Endpoints that one request is sent to at most."""


class UnknownModelError(Exception):
    """No endpoint serves the model that a request names."""


class Router:
    """A fleet, the policy that chooses from it, and what comes of the choices.

    The event loop's thread only; nothing here waits.
    """

    def __init__(
        self, fleet: Fleet, policy: Policy, book: HealthBook, retries: RetryBudget
    ) -> None:
        self.fleet, self.policy = fleet, policy
        self._book, self._retries = book, retries
        self._models: frozenset[str] = frozenset()
        self._is_open_to_any = True
        self._is_mixed = False
        self._version = -1

    @property
    def needs(self) -> Needs:
        """What has to be known of a request before it is routed."""
        needs = self.policy.needs
        return needs | Needs.MODEL if self._distinguishes_models() else needs

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
        if not tried:
            self._retries.requested()
        ready = self._candidates(view, tried)
        if not ready:
            return NO_ENDPOINT
        return self.policy.choose(view, ready, now_s, explain=explain)

    def _candidates(self, view: RequestView, tried: Sequence[Endpoint]) -> Sequence[Endpoint]:
        model = None
        if view.model is not None and self._distinguishes_models():
            # Only names that exist may become keys of the fleet's table.
            model = view.model if view.model in self._models else None
            if model is None and not self._is_open_to_any:
                raise UnknownModelError(view.model)
        ready = self.fleet.ready(Role.SERVE, model)
        if tried:
            ready = tuple(endpoint for endpoint in ready if endpoint not in tried)
        return ready

    def _distinguishes_models(self) -> bool:
        """Whether it depends on the model who can serve a request."""
        if self._version != self.fleet.version:
            self._version = self.fleet.version
            served = [endpoint.models for endpoint in self.fleet if endpoint.role is Role.SERVE]
            self._models = frozenset[str]().union(*served)
            self._is_open_to_any = not all(served)
            self._is_mixed = len(set(served)) > 1
        return self._is_mixed

    def may_retry(self, view: RequestView, tried: Sequence[Endpoint]) -> bool:
        """Whether there is another endpoint to try."""
        return len(tried) < ATTEMPTS_MAX and bool(self._candidates(view, tried))

    def take_retry(self, now_s: float) -> bool:
        """Take one retry from the budget."""
        return self._retries.take(now_s)

    def began(self, endpoint: Endpoint, now_s: float) -> int:
        """A request goes to an endpoint; returns a ticket for ``ended``."""
        endpoint.num_in_flight += 1
        return self._book.began(endpoint, now_s)

    def first_byte(self, endpoint: Endpoint, ttft_s: float) -> None:
        """The endpoint answers."""
        before_s = endpoint.ttft_s
        endpoint.ttft_s = before_s + TTFT_WEIGHT * (ttft_s - before_s) if before_s else ttft_s

    def ended(self, endpoint: Endpoint, ticket: int, outcome: Outcome, now_s: float) -> None:
        """The endpoint has nothing to do with the request any more."""
        endpoint.num_in_flight -= 1
        if outcome in FAILURES:
            endpoint.num_failed += 1
        elif outcome is Outcome.FINISHED:
            endpoint.num_done += 1
        self._book.ended(endpoint, ticket, outcome, now_s)
