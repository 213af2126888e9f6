"""Keys around a ring: each belongs to the next endpoint clockwise.

Where a key and an endpoint lie follows from their bytes alone, so two routers, and one before and
after a restart, agree without talking. A joining endpoint takes keys from the others, a leaving one
gives its keys to the others, and no other key moves.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import chain

import xxhash

from kvkeep.router.policies.load import weight_of
from kvkeep.router.snapshot import Endpoint

POINTS_PER_WEIGHT = 512
"""Points of an endpoint of weight 1. Shares differ by about 1 / sqrt(points), here 4 %; 64
endpoints make 32,768 points, sorted anew only when the fleet changes."""

POINTS_MAX = 4096
"""Points of one endpoint, whatever its weight."""

RINGS_MAX = 16
"""Rings kept: one per set of ready endpoints, which differ by role, by model, and while one of
them is down."""


def spot_of(key: bytes) -> int:
    """Return where on the ring a key lies: 64 bits."""
    return xxhash.xxh3_64_intdigest(key)


class Ring:
    """The points of some endpoints; never changes."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        """Place the endpoints, of which there is at least one."""
        placed = sorted(chain.from_iterable(map(_points, endpoints)), key=_by_spot_and_name)
        self.endpoints = tuple(endpoints)
        self._spots = [spot for spot, _ in placed]
        self._owners = [endpoint for _, endpoint in placed]

    def home(self, spot: int) -> Endpoint:
        """Return the endpoint that a key at this spot belongs to."""
        return self._owners[bisect_left(self._spots, spot) % len(self._owners)]

    def walk(self, spot: int) -> Iterator[Endpoint]:
        """Yield every endpoint once, the key's home first, then clockwise."""
        owners = self._owners
        start = bisect_left(self._spots, spot)
        seen: set[str] = set()
        for step in range(len(owners)):
            owner = owners[(start + step) % len(owners)]
            if owner.name not in seen:
                seen.add(owner.name)
                yield owner
                if len(seen) == len(self.endpoints):
                    return


def _points(endpoint: Endpoint) -> Iterator[tuple[int, Endpoint]]:
    num_points = round(POINTS_PER_WEIGHT * weight_of(endpoint))
    for number in range(max(1, min(POINTS_MAX, num_points))):
        yield spot_of(b"%s\0%d" % (endpoint.name.encode(), number)), endpoint


def _by_spot_and_name(point: tuple[int, Endpoint]) -> tuple[int, str]:
    # Two endpoints at one spot: the name decides, for the order of ``ready`` differs by router.
    return point[0], point[1].name


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
