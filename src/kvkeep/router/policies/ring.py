"""The rings of endpoints: where a key has its home; core/ring.py says how."""

from collections.abc import Sequence

from kvkeep.core import ring
from kvkeep.core.ring import spot_of as spot_of
from kvkeep.router.policies.load import weight_of
from kvkeep.router.snapshot import Endpoint

RINGS_MAX = 16
"""Rings kept: one per set of ready endpoints, which differ by role, by model, and while one of
them is down."""


class Ring(ring.Ring[Endpoint]):
    """The points of some endpoints, of which there is at least one."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        super().__init__((endpoint.name, weight_of(endpoint), endpoint) for endpoint in endpoints)
        self.endpoints = tuple(endpoints)


class Rings:
    """The rings of the sets of endpoints that are ready, made when first needed."""

    def __init__(self) -> None:
        self._rings: dict[tuple[tuple[str, float], ...], tuple[Sequence[Endpoint], Ring]] = {}
        self._last: tuple[Sequence[Endpoint], Ring] | None = None

    def of(self, ready: Sequence[Endpoint]) -> Ring:
        """Return the ring of these endpoints, of which there is at least one."""
        # Most requests bring the very tuple that the last one brought.
        last = self._last
        if last is not None and last[0] is ready and isinstance(ready, tuple):
            return last[1]
        key = tuple((endpoint.name, endpoint.weight) for endpoint in ready)
        found = self._rings.pop(key, None)
        if found is None or any(map(_is_not, found[1].endpoints, ready)):
            found = (ready, Ring(ready))
        self._rings[key] = found
        if len(self._rings) > RINGS_MAX:
            del self._rings[next(iter(self._rings))]
        self._last = (ready, found[1])
        return found[1]

    def forget(self) -> None:
        """The fleet changed: let go of endpoints that may be gone."""
        self._rings.clear()
        self._last = None


def _is_not(one: Endpoint, other: Endpoint) -> bool:
    return one is not other
