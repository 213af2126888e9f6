"""Each endpoint in its turn."""

from collections.abc import Sequence

from kvkeep.router.policies.base import NO_ENDPOINT, Choice, Needs
from kvkeep.router.policies.turns import Turns
from kvkeep.router.request import RequestView
from kvkeep.router.snapshot import Endpoint


class RoundRobin:
    """Chooses the endpoint that was not chosen for longest; weights and load do not count."""

    name = "round_robin"
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
        """Choose whose turn it is."""
        if not ready:
            return NO_ENDPOINT
        endpoint = self._turns.next_of(ready)
        if explain:
            considered = tuple(
                (each.name, float(self._turns.of(each)), "when it had its last turn")
                for each in ready
            )
            return Choice(endpoint, "its turn", considered)
        self._turns.take(endpoint)
        return Choice(endpoint, "its turn")

    def joined(self, endpoint: Endpoint) -> None:
        """The newcomer is last in the round."""
        self._turns.joined(endpoint)

    def left(self, endpoint: Endpoint) -> None:
        """The round goes on without it."""
        self._turns.left(endpoint)
