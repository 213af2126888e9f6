"""What weighs against what when a prompt's prefix lies somewhere."""

from random import Random

import pytest

from kvkeep.router.events.block_events import BlockRemoved, BlockStored
from kvkeep.router.policies.prefix_aware import PrefixAware
from kvkeep.router.prefix_hashes import token_hashes, token_root
from kvkeep.router.prefix_index import PrefixIndex
from kvkeep.router.request import RequestView
from kvkeep.router.snapshot import Endpoint

BLOCK_TOKENS = 16
NUM_BLOCKS = 100


def asked(number: int, num_blocks: int = NUM_BLOCKS) -> RequestView:
    """A prompt of its own, from its first block on."""
    chance = Random(number)
    prefix = [chance.getrandbits(60) for _ in range(num_blocks)]
    return RequestView("/v1/completions", prefix=prefix, num_tokens=num_blocks * BLOCK_TOKENS)


@pytest.fixture
def fleet() -> tuple[Endpoint, ...]:
    return tuple(Endpoint(name=f"e{idx}", host="h", port=1) for idx in range(4))


@pytest.fixture
def policy(fleet: tuple[Endpoint, ...]) -> PrefixAware:
    made = PrefixAware(PrefixIndex(BLOCK_TOKENS), is_approximate=False)
    for endpoint in fleet:
        made.joined(endpoint)
    return made


def test_a_prefix_draws_its_requests(policy: PrefixAware, fleet: tuple[Endpoint, ...]) -> None:
    """Who holds the prefix is chosen, wherever on the ring it lies, and the reason says so."""
    for idx, endpoint in enumerate(fleet):
        policy.index.assume(endpoint.name, asked(idx).prefix or ())
    for idx, endpoint in enumerate(fleet):
        choice = policy.choose(asked(idx), fleet, 0.0)

        assert choice.endpoint is endpoint
        assert choice.reason == "holds 100 of 100 blocks"
        assert (choice.num_cached_blocks, choice.num_uncached) == (100, 1)


def test_a_queue_outweighs_a_short_prefix(policy: PrefixAware, fleet: tuple[Endpoint, ...]) -> None:
    """With more tokens queued before it than it would save, the prompt is computed elsewhere."""
    policy.index.assume("e0", (asked(1).prefix or ())[:50])
    before = policy.choose(asked(1), fleet, 0.0).endpoint
    fleet[0].queued_tokens = 2 * 50 * BLOCK_TOKENS

    assert before is fleet[0]
    assert policy.choose(asked(1), fleet, 0.0).endpoint is not fleet[0]


def test_a_hot_spot_is_avoided(policy: PrefixAware, fleet: tuple[Endpoint, ...]) -> None:
    """An endpoint far above the mean load is passed over, and the reason names it."""
    policy.index.assume("e0", asked(1).prefix or ())
    fleet[0].num_in_flight = 8
    choice = policy.choose(asked(1), fleet, 0.0)

    assert choice.endpoint is not fleet[0]
    assert choice.reason == "holds 0 of 100 blocks, e0 is over its bound"


def test_new_prefixes_spread(policy: PrefixAware, fleet: tuple[Endpoint, ...]) -> None:
    """Prompts that nobody holds go all over an idle fleet, the same prompt always to the same."""
    chosen = [policy.choose(asked(number), fleet, 0.0).endpoint for number in range(40)]
    again = [policy.choose(asked(number), fleet[::-1], 0.0).endpoint for number in range(40)]

    assert set(chosen) == set(fleet)
    assert chosen == again


def test_prompts_with_a_short_common_beginning_spread(
    policy: PrefixAware, fleet: tuple[Endpoint, ...]
) -> None:
    """A system prompt that one endpoint holds does not draw every conversation there."""
    system = asked(0, 5).prefix or ()
    policy.index.assume("e0", system)
    chosen = set()
    for number in range(1, 40):
        request = asked(number)
        request.prefix = [*system, *(request.prefix or ())[5:]]
        chosen.add(policy.choose(request, fleet, 0.0).endpoint)

    assert chosen == set(fleet)


def test_an_idle_fleet_shares_the_conversations_of_one_system_prompt(
    policy: PrefixAware, fleet: tuple[Endpoint, ...]
) -> None:
    """One request at a time leaves no queue, and still the first holder does not get them all."""
    system = asked(0, 50).prefix or ()
    chosen: list[Endpoint | None] = []
    for number in range(1, 101):
        request = asked(number)
        request.prefix = [*system, *(request.prefix or ())[50:]]
        now_s = number / 4
        choice = policy.choose(request, fleet, now_s)
        policy.sent(request, choice, now_s)
        chosen.append(choice.endpoint)
        # The next turn of the same conversation stays.
        assert policy.choose(request, fleet, now_s).endpoint is choice.endpoint

    assert max(chosen.count(endpoint) for endpoint in fleet) <= 60


def test_what_tiers_hold_counts_for_most(policy: PrefixAware, fleet: tuple[Endpoint, ...]) -> None:
    """A prefix in tiers draws requests; one in the cache draws them more."""
    tokens = list(range(NUM_BLOCKS * BLOCK_TOKENS))
    prefix = token_hashes(tokens, BLOCK_TOKENS, token_root())
    request = RequestView("/v1/completions", prefix=prefix, num_tokens=len(tokens))
    names: list[int | bytes] = [*range(NUM_BLOCKS)]
    for endpoint, medium in ((fleet[2], "CPU"), (fleet[1], "GPU")):
        event = BlockStored(names, tokens, BLOCK_TOKENS, medium=medium)
        policy.index.apply(endpoint.name, event)
        choice = policy.choose(request, fleet, 0.0)

        assert choice.endpoint is endpoint
    policy.index.apply("e1", BlockRemoved(names, "GPU"))

    assert policy.choose(request, fleet, 0.0).endpoint is fleet[2]


def test_a_faster_endpoint_is_preferred(policy: PrefixAware, fleet: tuple[Endpoint, ...]) -> None:
    """Measured rates decide between endpoints that hold nothing."""
    now_s = 0.0
    for number in range(20):
        for endpoint in fleet[:2]:
            now_s += 2.0
            choice = policy.choose(asked(number), (endpoint,), now_s)
            policy.sent(asked(number), choice, now_s)
            wait_s = 0.1 if endpoint is fleet[0] else 1.0
            policy.first_byte(asked(number), choice, now_s + wait_s, wait_s)
    chosen = {policy.choose(asked(number), fleet[:2], now_s).endpoint for number in range(50, 80)}

    assert chosen == {fleet[0]}


def test_responses_shrink_what_is_believed(
    policy: PrefixAware, fleet: tuple[Endpoint, ...]
) -> None:
    """An engine that says it held less than believed is believed to have less room."""
    for number in range(10):
        policy.index.assume("e0", asked(number).prefix or ())
    before = policy.index.num_blocks("e0")
    choice = policy.choose(asked(0), fleet[:1], 0.0)
    policy.sent(asked(0), choice, 0.0)
    policy.ended(asked(0), choice, 0, 1600)

    assert before == 1000
    assert policy.index.num_blocks("e0") < before
    assert policy.index.match(asked(0).prefix or (), ["e0"]) == [100]
    assert policy.index.match(asked(1).prefix or (), ["e0"])[0] < 100


def test_a_prompt_without_a_block_goes_where_load_is_least(
    policy: PrefixAware, fleet: tuple[Endpoint, ...]
) -> None:
    """Short prompts need no prefix; the reason says why none was looked at."""
    for endpoint in fleet[1:]:
        endpoint.num_in_flight = 1
    choice = policy.choose(RequestView("/v1/completions", prefix=[], num_tokens=5), fleet, 0.0)

    assert choice.endpoint is fleet[0]
    assert choice.reason.startswith("no full block, ")


def test_an_explanation_tells_of_every_endpoint(
    policy: PrefixAware, fleet: tuple[Endpoint, ...]
) -> None:
    """Blocks, tokens to compute, queue and bound of each are said, the chosen one has least."""
    policy.index.assume("e2", asked(1).prefix or ())
    choice = policy.choose(asked(1), fleet, 0.0, explain=True)
    scores = {name: score for name, score, _ in choice.considered}

    assert choice.endpoint is fleet[2]
    assert list(scores) == ["e0", "e1", "e2", "e3"]
    assert min(scores, key=lambda name: scores[name]) == "e2"
    assert "holds 100 blocks" in choice.considered[2][2]
