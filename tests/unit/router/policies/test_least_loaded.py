"""The least to do, by requests, by queued tokens, by weight."""

import pytest

from kvkeep.router.policies.least_loaded import LeastLoaded
from kvkeep.router.request import RequestView
from kvkeep.router.snapshot import Endpoint

REQUEST = RequestView("/v1/completions")


@pytest.mark.parametrize(
    ("busy", "free"),
    [
        ({"num_in_flight": 2}, {"num_in_flight": 1}),
        ({"queued_tokens": 4096}, {"num_in_flight": 3}),
        ({"num_in_flight": 3, "weight": 1.0}, {"num_in_flight": 4, "weight": 2.0}),
        ({"weight": 0.0, "num_in_flight": 1}, {"num_in_flight": 9}),
    ],
    ids=["requests", "tokens", "weight", "no weight"],
)
def test_the_least_loaded_is_chosen(busy: dict[str, float], free: dict[str, float]) -> None:
    """Load is requests in flight and queued prompt tokens, per weight."""
    fleet = (
        Endpoint(name="busy", host="h", port=1, **busy),  # type: ignore[arg-type]
        Endpoint(name="free", host="h", port=1, **free),  # type: ignore[arg-type]
    )

    assert LeastLoaded().choose(REQUEST, fleet, 0.0).endpoint is fleet[1]
    assert LeastLoaded().choose(REQUEST, fleet[::-1], 0.0).endpoint is fleet[1]


def test_an_idle_fleet_is_all_used() -> None:
    """Requests that come one after another do not all go to the first endpoint."""
    fleet = tuple(Endpoint(name=f"e{idx}", host="h", port=1) for idx in range(3))
    policy = LeastLoaded()

    assert {policy.choose(REQUEST, fleet, 0.0).endpoint for _ in range(3)} == set(fleet)
