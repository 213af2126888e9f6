"""The seam between the ledger and an eviction policy."""

from collections.abc import Callable
from typing import Protocol


class EvictionPolicy(Protocol):
    """Orders slots by how soon they should make room.

    What it is: a memory of use. It knows slots, never bytes or keys.

    Life of one slot: ``added`` once, ``used`` any number of times, ``removed`` once.

    The caller guarantees: ``used`` and ``removed`` only name slots that were added.

    The implementer must: name each slot at most once per call of ``victims``; forget nothing that
    was not removed; need O(1) per call and, in ``victims``, per slot looked at.

    Threading and blocking: one thread; never blocks.
    """

    def added(self, slot: int) -> None:
        """A block in this slot became readable."""
        ...

    def used(self, slot: int) -> None:
        """The block in this slot was read."""
        ...

    def removed(self, slot: int) -> None:
        """The block in this slot is gone."""
        ...

    def victims(self, num_slots: int, is_evictable: Callable[[int], bool]) -> list[int]:
        """Name up to ``num_slots`` slots to empty, best first; changes nothing."""
        ...
