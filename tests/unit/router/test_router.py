"""What the router notes of an endpoint while a request is there."""

import pytest

from kvkeep.router.health.book import HealthBook, HealthSettings, Outcome
from kvkeep.router.limits.bucket import RetryBudget
from kvkeep.router.policies.prefix_aware import PrefixAware
from kvkeep.router.prefix_index import PrefixIndex
from kvkeep.router.request import RequestView
from kvkeep.router.router import Ending, Router
from kvkeep.router.snapshot import Endpoint, EndpointState, Fleet

BLOCK_TOKENS = 16
PROMPT = RequestView("/v1/completions", prefix=[1, 2, 3, 4], num_tokens=4 * BLOCK_TOKENS + 5)


@pytest.fixture
def router() -> Router:
    """A router before one engine that is ready."""
    fleet = Fleet([Endpoint("only", "127.0.0.1", 1, state=EndpointState.READY)])
    book = HealthBook(fleet, HealthSettings())
    for endpoint in fleet:
        book.join(endpoint, 0.0)
        endpoint.state = EndpointState.READY
    return Router(fleet, PrefixAware(PrefixIndex(BLOCK_TOKENS)), book, RetryBudget(0.1, 1.0, 10))


@pytest.mark.parametrize("was_answered", [True, False])
def test_only_what_has_to_be_computed_waits_in_a_queue(
    router: Router, *, was_answered: bool
) -> None:
    """A prefix that the endpoint holds is no work; the queue is empty once the request is over."""
    (endpoint,) = router.fleet
    assert isinstance(router.policy, PrefixAware)
    router.policy.index.assume("only", PROMPT.prefix or ())
    choice = router.route(PROMPT, 0.0)
    ticket = router.began(PROMPT, choice, 0.0)
    queued = endpoint.queued_tokens
    if was_answered:
        router.first_byte(PROMPT, choice, 1.0, 1.0)
    after_first_byte = endpoint.queued_tokens
    router.ended(PROMPT, choice, ticket, Ending(Outcome.FINISHED, was_answered), 2.0)

    assert queued == 5
    assert after_first_byte == (0 if was_answered else 5)
    assert endpoint.queued_tokens == 0
