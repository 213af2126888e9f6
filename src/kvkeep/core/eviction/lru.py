"""Least recently used first."""

from collections import OrderedDict
from collections.abc import Callable


class LruPolicy:
    """An EvictionPolicy: the order of last use, oldest first."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def added(self, slot: int, fingerprint: int) -> None:
        """Put the slot last; what it held before doesn't count."""
        self._order[slot] = None

    def used(self, slot: int) -> None:
        """Move the slot last."""
        self._order.move_to_end(slot)

    def removed(self, slot: int) -> None:
        """Forget the slot."""
        del self._order[slot]

    def victims(self, num_slots: int, is_evictable: Callable[[int], bool]) -> list[int]:
        """Oldest evictable slots; looks past leased ones, which are few and recent."""
        found: list[int] = []
        for slot in self._order:
            if len(found) == num_slots:
                break
            if is_evictable(slot):
                found.append(slot)
        return found
