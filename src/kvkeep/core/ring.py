"""Keys around a ring: each belongs to the next member clockwise.

Where a key and a member lie follows from their bytes alone, so two processes, and one before and
after a restart, agree without talking. A joining member takes keys from the others, a leaving one
gives its keys to the others, and no other key moves.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import xxhash

POINTS_PER_WEIGHT = 512
"""Points of a member of weight 1. Shares differ by about 1 / sqrt(points), here 4 %; 64 members
make 32,768 points, sorted anew only when the members change."""

POINTS_MAX = 4096
"""Points of one member, whatever its weight."""

Member = TypeVar("Member")


def spot_of(key: bytes) -> int:
    """Return where on the ring a key lies: 64 bits."""
    return xxhash.xxh3_64_intdigest(key)


class Ring(Generic[Member]):
    """The points of some members; never changes."""

    def __init__(self, members: Iterable[tuple[str, float, Member]]) -> None:
        """Place members.

        Args:
            members: Name, weight and the member itself; at least one, and no name twice.
        """
        placed: list[tuple[int, str, Member]] = []
        for name, weight, member in members:
            num_points = max(1, min(POINTS_MAX, round(POINTS_PER_WEIGHT * weight)))
            for number in range(num_points):
                placed.append((spot_of(b"%s\0%d" % (name.encode(), number)), name, member))
        # Two members at one spot: the name decides, for the order of members differs by process.
        placed.sort(key=lambda point: point[:2])
        self._spots = [spot for spot, _, _ in placed]
        self._names = [name for _, name, _ in placed]
        self._owners = [member for _, _, member in placed]
        self._num_members = len(set(self._names))

    def home(self, spot: int) -> Member:
        """Return the member that a key at this spot belongs to."""
        return self._owners[bisect_left(self._spots, spot) % len(self._owners)]

    def walk(self, spot: int) -> Iterator[Member]:
        """Yield every member once, the key's home first, then clockwise."""
        num_points = len(self._owners)
        start = bisect_left(self._spots, spot)
        seen: set[str] = set()
        for step in range(num_points):
            point = (start + step) % num_points
            if self._names[point] not in seen:
                seen.add(self._names[point])
                yield self._owners[point]
                if len(seen) == self._num_members:
                    return
