"""The better one of two endpoints drawn by chance."""

from collections.abc import Sequence
from random import Random

from kvkeep.router.policies.base import NO_ENDPOINT, Choice, Needs
from kvkeep.router.policies.load import load_of
from kvkeep.router.request import RequestView
from kvkeep.router.snapshot import Endpoint


class PowerOfTwo:
    """Draws two endpoints and takes the less loaded one.

    Where several routers share a fleet, each sees its own requests only; all of them rushing at the
    one endpoint that looks idle is what the draw prevents.
    """

    name = "power_of_two"
    needs = Needs.NOTHING

    def __init__(self, chance: Random) -> None:
        """Take the chance to draw with; nobody else draws from it."""
        self._chance = chance

    def choose(
        self,
        request: RequestView,
        ready: Sequence[Endpoint],
        now_s: float,
        *,
        explain: bool = False,
    ) -> Choice:
        """Draw two, take the less loaded one, of equals the one drawn first."""
        if not ready:
            return NO_ENDPOINT
        if len(ready) == 1:
            only = ready[0]
            return Choice(only, "the only one", _considered(ready, ready) if explain else ())
        if explain:
            before = self._chance.getstate()
            first, second = self._draw(ready)
            self._chance.setstate(before)
        else:
            first, second = self._draw(ready)
        better, worse = (first, second) if load_of(first) <= load_of(second) else (second, first)
        reason = f"less loaded than {worse.name}"
        if not explain:
            return Choice(better, reason)
        return Choice(better, reason, _considered(ready, (first, second)))

    def _draw(self, ready: Sequence[Endpoint]) -> tuple[Endpoint, Endpoint]:
        first_idx = int(self._chance.random() * len(ready))
        # Of the others: skipping the first keeps the two distinct without drawing again.
        second_idx = int(self._chance.random() * (len(ready) - 1))
        return ready[first_idx], ready[second_idx + (second_idx >= first_idx)]

    def joined(self, endpoint: Endpoint) -> None:
        """Nothing is held for it."""

    def left(self, endpoint: Endpoint) -> None:
        """Nothing was held for it."""


def _considered(
    ready: Sequence[Endpoint], drawn: Sequence[Endpoint]
) -> tuple[tuple[str, float, str], ...]:
    return tuple(
        (each.name, load_of(each), "drawn" if each in drawn else "not drawn") for each in ready
    )
