"""Turns, whoever is ready."""

from collections import Counter

from kvkeep.router.policies.round_robin import RoundRobin
from kvkeep.router.request import RequestView
from kvkeep.router.snapshot import Endpoint

REQUEST = RequestView("/v1/completions")


def make_fleet(num_endpoints: int) -> tuple[Endpoint, ...]:
    return tuple(Endpoint(name=f"e{idx}", host="h", port=1) for idx in range(num_endpoints))


def chosen(policy: RoundRobin, ready: tuple[Endpoint, ...]) -> str:
    endpoint = policy.choose(REQUEST, ready, 0.0).endpoint
    assert endpoint is not None
    return endpoint.name


def test_requests_of_two_kinds_each_take_turns() -> None:
    """Alternating between two groups, as roles do, each group is used evenly."""
    policy, fleet = RoundRobin(), make_fleet(4)
    for endpoint in fleet:
        policy.joined(endpoint)
    counts = Counter(chosen(policy, fleet[:2] if n % 2 else fleet[2:]) for n in range(40))

    assert set(counts.values()) == {10}


def test_a_newcomer_is_not_flooded() -> None:
    """Who joins late gets its turns from then on, not those it missed."""
    policy, fleet = RoundRobin(), make_fleet(3)
    for endpoint in fleet[:2]:
        policy.joined(endpoint)
    for _ in range(10):
        chosen(policy, fleet[:2])
    policy.joined(fleet[2])
    counts = Counter(chosen(policy, fleet) for _ in range(9))

    assert set(counts.values()) == {3}
