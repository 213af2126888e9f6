"""What every routing policy promises, of any fleet and any request; and what consistent ones do."""

from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.router.policies.base import Choice, Learns, Policy
from kvkeep.router.policies.consistent_hash import LOAD_FACTOR, ConsistentHash
from kvkeep.router.policies.least_loaded import LeastLoaded
from kvkeep.router.policies.load import FREE_REQUESTS
from kvkeep.router.policies.power_of_two import PowerOfTwo
from kvkeep.router.policies.prefix_aware import PrefixAware
from kvkeep.router.policies.round_robin import RoundRobin
from kvkeep.router.policies.session_affinity import SessionAffinity
from kvkeep.router.prefix_index import PrefixIndex
from kvkeep.router.request import RequestView
from kvkeep.router.snapshot import Endpoint, EndpointState

POLICIES: dict[str, Callable[[], Policy]] = {
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "power_of_two": lambda: PowerOfTwo(Random(7)),
    "consistent_hash": ConsistentHash,
    "session_affinity": SessionAffinity,
    "prefix_aware": lambda: PrefixAware(PrefixIndex(16, 64)),
}

EXAMPLES = 40
"""Fewer than elsewhere, for a new ring is made in each."""

requests = st.builds(
    RequestView,
    path=st.just("/v1/chat/completions"),
    key=st.none() | st.binary(max_size=4),
    prefix=st.none() | st.lists(st.integers(0, 5), max_size=6, unique=True),
    num_tokens=st.none() | st.integers(0, 200),
)
names = st.sampled_from([f"engine-{idx}" for idx in range(6)])
fleets = st.lists(names, max_size=6, unique=True).map(
    lambda found: tuple(map(make_endpoint, found))
)


def make_endpoint(name: str) -> Endpoint:
    return Endpoint(name=name, host="127.0.0.1", port=1, state=EndpointState.READY)


def make_fleet(num_endpoints: int) -> tuple[Endpoint, ...]:
    return tuple(make_endpoint(f"http://10.0.0.{idx}:8000") for idx in range(num_endpoints))


def join(policy: Policy, fleet: Sequence[Endpoint]) -> None:
    for endpoint in fleet:
        policy.joined(endpoint)


def play(policy: Policy, fleet: Sequence[Endpoint], asked: Sequence[RequestView]) -> list[Choice]:
    """Route requests of which none ends."""
    choices = []
    for request in asked:
        choice = policy.choose(request, fleet, 0.0)
        choices.append(choice)
        if choice.endpoint is not None:
            choice.endpoint.num_in_flight += 1
            choice.endpoint.queued_tokens += choice.num_uncached
            if isinstance(policy, Learns):
                policy.sent(request, choice, 0.0)
    return choices


def names_of(choices: Sequence[Choice]) -> list[str | None]:
    return [choice.endpoint.name if choice.endpoint else None for choice in choices]


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=EXAMPLES)
@given(fleet=fleets, asked=st.lists(requests, max_size=20), drained=st.integers(0, 6))
def test_only_ready_endpoints_are_chosen(
    name: str, fleet: tuple[Endpoint, ...], asked: list[RequestView], drained: int
) -> None:
    """Whatever joined, only what is in ``ready`` is chosen, and nothing only from nothing."""
    policy = POLICIES[name]()
    join(policy, fleet)
    for ready in (fleet, fleet[drained:], fleet):
        for choice in play(policy, ready, asked):
            assert choice.endpoint in ready if ready else choice.endpoint is None
            assert choice.reason.isascii()
            assert choice.reason.isprintable()
            assert len(choice.reason) < 100


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=EXAMPLES)
@given(fleet=fleets, asked=st.lists(requests, min_size=1, max_size=12))
def test_an_explanation_says_what_will_be_chosen_and_changes_nothing(
    name: str, fleet: tuple[Endpoint, ...], asked: list[RequestView]
) -> None:
    """Explained any number of times, a request goes where the explanation said."""
    policy = POLICIES[name]()
    join(policy, fleet)
    for request in asked:
        explained = [policy.choose(request, fleet, 0.0, explain=True) for _ in range(2)]
        (choice,) = play(policy, fleet, [request])

        assert [choice.endpoint] * 2 == [each.endpoint for each in explained]
        assert not choice.considered
        for each in explained:
            assert {entry[0] for entry in each.considered} <= {one.name for one in fleet}
            assert bool(each.considered) == bool(fleet)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=EXAMPLES)
@given(asked=st.lists(requests, max_size=20), num_endpoints=st.integers(1, 5))
def test_choices_are_deterministic(name: str, asked: list[RequestView], num_endpoints: int) -> None:
    """Two routers that saw the same choose the same: there is no chance but the seed."""
    chosen = []
    for _ in range(2):
        policy, fleet = POLICIES[name](), make_fleet(num_endpoints)
        join(policy, fleet)
        chosen.append(names_of(play(policy, fleet, asked)))

    assert chosen[0] == chosen[1]


@settings(max_examples=EXAMPLES)
@given(
    keys=st.lists(st.binary(min_size=1, max_size=3), max_size=80),
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=1, max_size=6),
)
def test_the_bound_on_loads_is_never_exceeded(keys: list[bytes], weights: list[float]) -> None:
    """However skewed the keys, none has more in flight than its bounded share, or a free few."""
    policy, fleet = ConsistentHash(), make_fleet(len(weights))
    for endpoint, weight in zip(fleet, weights, strict=True):
        endpoint.weight = weight
    join(policy, fleet)
    for num_before, key in enumerate(keys):
        (choice,) = play(policy, fleet, [RequestView("/v1/completions", key=key)])
        assert choice.endpoint is not None
        share = choice.endpoint.weight / sum(weights)

        bound = LOAD_FACTOR * (num_before + 1) * share
        assert choice.endpoint.num_in_flight < max(FREE_REQUESTS, bound) + 1


def homes(fleet: Sequence[Endpoint], num_keys: int) -> dict[bytes, str]:
    """Where each key goes while nothing is in flight."""
    policy = ConsistentHash()
    join(policy, fleet)
    found = {}
    for number in range(num_keys):
        key = b"user-%d" % number
        endpoint = policy.choose(RequestView("/", key=key), fleet, 0.0).endpoint
        assert endpoint is not None
        found[key] = endpoint.name
    return found


@pytest.mark.parametrize("num_endpoints", [2, 3, 4, 8])
def test_keys_spread_evenly(num_endpoints: int) -> None:
    """Of 5,000 keys no endpoint gets a quarter more than the mean."""
    counts = Counter(homes(make_fleet(num_endpoints), 5000).values())

    assert max(counts.values()) <= 1.25 * 5000 / num_endpoints
    assert len(counts) == num_endpoints


@settings(max_examples=EXAMPLES)
@given(num_endpoints=st.integers(2, 7), gone=st.integers(0, 6), chance=st.randoms())
def test_only_the_share_of_who_joins_or_leaves_moves(
    num_endpoints: int, gone: int, chance: Random
) -> None:
    """A key that was not at the leaving endpoint stays; the order of the list does not matter."""
    fleet = list(make_fleet(num_endpoints))
    left = fleet[gone % num_endpoints]
    before = homes(tuple(fleet), 300)
    chance.shuffle(fleet)
    after = homes(tuple(each for each in fleet if each is not left), 300)

    assert {key for key in before if before[key] != after[key]} == {
        key for key in before if before[key] == left.name
    }


def test_weights_are_shares() -> None:
    """An endpoint of weight 3 has about three times as many keys as one of weight 1."""
    fleet = make_fleet(2)
    fleet[0].weight = 3.0
    counts = Counter(homes(fleet, 4000).values())

    assert 2.5 < counts[fleet[0].name] / counts[fleet[1].name] < 3.5


def test_homes_never_change_between_versions() -> None:
    """Routers of two versions beside each other agree: these homes are part of the interface."""
    found = homes(make_fleet(4), 8)

    assert [name.split(":")[1][-1] for name in found.values()] == EXPECTED_HOMES


EXPECTED_HOMES = ["0", "3", "2", "3", "0", "3", "2", "2"]
