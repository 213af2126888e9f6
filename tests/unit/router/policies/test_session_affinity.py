"""Sessions stay, and are forgotten in time."""

import pytest

from kvkeep.router.policies.session_affinity import SessionAffinity
from kvkeep.router.request import RequestView
from kvkeep.router.snapshot import Endpoint

FLEET = tuple(Endpoint(name=f"e{idx}", host="h", port=1) for idx in range(4))


def asked(key: bytes) -> RequestView:
    return RequestView("/v1/completions", key=key)


@pytest.mark.parametrize("key", [b"a", b"b", b"c", b"d", b"e", b"f"])
def test_a_session_stays_when_others_join(key: bytes) -> None:
    """New endpoints get new sessions only, and load moves none that has begun."""
    policy = SessionAffinity()
    first = policy.choose(asked(key), FLEET[:1], 0.0).endpoint
    FLEET[0].num_in_flight = 100
    try:
        later = policy.choose(asked(key), FLEET, 1.0)
        other = policy.choose(asked(b"new " + key), FLEET, 1.0)
    finally:
        FLEET[0].num_in_flight = 0

    assert later.endpoint is first is FLEET[0]
    assert later.reason == "where the session is"
    assert other.endpoint is not FLEET[0]


def test_a_session_whose_endpoint_left_begins_anew() -> None:
    """It goes to one that is ready, and stays there even when the old one is back."""
    policy = SessionAffinity()
    assert policy.choose(asked(b"a"), FLEET[:1], 0.0).endpoint is FLEET[0]
    second = policy.choose(asked(b"a"), FLEET[1:2], 1.0)

    assert second.endpoint is FLEET[1]
    assert second.reason.startswith("new session")
    assert policy.choose(asked(b"a"), FLEET, 2.0).endpoint is FLEET[1]


def test_idle_and_surplus_sessions_are_forgotten() -> None:
    """The table is bounded by number, the least recently used first, and sessions by idle time."""
    policy = SessionAffinity(sessions_max=2, idle_s=10.0)
    for key in (b"a", b"b", b"a", b"c"):
        policy.choose(asked(key), FLEET[:1], 0.0)

    assert len(policy) == 2
    assert policy.choose(asked(b"b"), FLEET, 1.0).reason.startswith("new session")
    assert policy.choose(asked(b"c"), FLEET, 9.0).reason == "where the session is"
    assert policy.choose(asked(b"c"), FLEET, 19.5).reason.startswith("new session")
