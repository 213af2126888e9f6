"""The same key to the same endpoint, unless that one has far more to do than the others."""

from collections.abc import Sequence

from kvkeep.router.policies.base import NO_ENDPOINT, Choice, Needs
from kvkeep.router.policies.least_loaded import LeastLoaded
from kvkeep.router.policies.load import FREE_REQUESTS, LoadBound
from kvkeep.router.policies.ring import Ring, Rings, spot_of
from kvkeep.router.request import RequestView
from kvkeep.router.snapshot import Endpoint

LOAD_FACTOR = 1.25
"""How far above the mean load an endpoint may go before its keys go to the next on the ring."""

AT_HOME = "home of the key"


class ConsistentHash:
    """Consistent hashing with bounded loads. A request without a key goes where load is least."""

    name = "consistent_hash"
    needs = Needs.KEY

    def __init__(self, load_factor: float = LOAD_FACTOR) -> None:
        """Start with no endpoint.

        Args:
            load_factor: Above 1: the share of the mean that each may have in flight.
        """
        self._load_factor = load_factor
        self._rings = Rings()
        self._keyless = LeastLoaded()

    def choose(
        self,
        request: RequestView,
        ready: Sequence[Endpoint],
        now_s: float,
        *,
        explain: bool = False,
    ) -> Choice:
        """Choose the key's home, or the next on the ring that has room."""
        if not ready:
            return NO_ENDPOINT
        if request.key is None:
            choice = self._keyless.choose(request, ready, now_s, explain=explain)
            return Choice(choice.endpoint, "no key, " + choice.reason, choice.considered)
        ring, spot = self._rings.of(ready), spot_of(request.key)
        endpoint, reason = with_room(ring, spot, self._load_factor)
        if not explain:
            return Choice(endpoint, reason)
        return Choice(endpoint, reason, _considered(ring, spot, self._load_factor))

    def joined(self, endpoint: Endpoint) -> None:
        """Its keys are its own from the next request on."""
        self._rings.forget()
        self._keyless.joined(endpoint)

    def left(self, endpoint: Endpoint) -> None:
        """Its keys go to the others."""
        self._rings.forget()
        self._keyless.left(endpoint)


def with_room(ring: Ring, spot: int, load_factor: float) -> tuple[Endpoint, str]:
    """Return the first endpoint from a spot on that is below its bound, and why it is this one."""
    home = ring.home(spot)
    # Nearly always: the fleet is not so busy that loads need be summed up.
    if home.num_in_flight < FREE_REQUESTS:
        return home, AT_HOME
    bound = LoadBound(ring.endpoints, load_factor)
    if bound.has_room(home):
        return home, AT_HOME
    for endpoint in ring.walk(spot):
        if bound.has_room(endpoint):
            return endpoint, f"home {home.name} is over its bound of {bound.of(home)}"
    return home, AT_HOME


def _considered(ring: Ring, spot: int, load_factor: float) -> tuple[tuple[str, float, str], ...]:
    bound = LoadBound(ring.endpoints, load_factor)
    return tuple(
        (
            endpoint.name,
            float(place),
            f"{place} steps from home, {endpoint.num_in_flight} of {bound.of(endpoint)} in flight",
        )
        for place, endpoint in enumerate(ring.walk(spot))
    )
