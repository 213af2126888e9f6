"""The endpoint with the least to do."""

from collections.abc import Sequence

from kvkeep.router.policies.base import NO_ENDPOINT, Choice, Needs
from kvkeep.router.policies.load import load_of
from kvkeep.router.policies.turns import Turns
from kvkeep.router.request import RequestView
from kvkeep.router.snapshot import Endpoint


class LeastLoaded:
    """Chooses the lowest load per weight; equals take turns, so that an idle fleet is all used."""

    name = "least_loaded"
    needs = Needs.NOTHING

    def __init__(self) -> None:
        self._turns = Turns()

    def choose(
        self,
        request: RequestView,
        ready: Sequence[Endpoint],
        now_s: float,
        *,
        explain: bool = False,
    ) -> Choice:
        """Choose the least loaded endpoint, of equals the one that was not chosen for longest."""
        if not ready:
            return NO_ENDPOINT
        endpoint = min(ready, key=self._rank)
        reason = f"least loaded, {endpoint.num_in_flight} in flight"
        if explain:
            considered = tuple((each.name, load_of(each), "its load") for each in ready)
            return Choice(endpoint, reason, considered)
        self._turns.take(endpoint)
        return Choice(endpoint, reason)

    def _rank(self, endpoint: Endpoint) -> tuple[float, int]:
        return load_of(endpoint), self._turns.of(endpoint)

    def joined(self, endpoint: Endpoint) -> None:
        """The newcomer is last among equals."""
        self._turns.joined(endpoint)

    def left(self, endpoint: Endpoint) -> None:
        """Forget its turn."""
        self._turns.left(endpoint)
