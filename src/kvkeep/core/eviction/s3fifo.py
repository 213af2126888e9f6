"""S3-FIFO: a small queue on probation, a main queue, and a ghost of what left the small one.

Source: Yang and others, "FIFO queues are all you need for cache eviction" (SOSP 2023). What
differs, and why, is in docs/decisions/0014-eviction-and-admission.md.
"""

from collections import OrderedDict, deque
from collections.abc import Callable

SMALL_SHARE = 0.1
"""Of the known slots: the paper's figure. Conversations do better with 0.25, scans with less."""

USES_MAX = 3
"""Uses that are told apart: two bits in the paper."""


class S3FifoPolicy:
    """An EvictionPolicy: a block that was never read leaves early, whatever came before it.

    A block enters ``small``, or ``main`` if the ghost remembers it. Where ``small`` holds more than
    its share, its oldest block goes: to ``main`` if it was read, else out of the pool and into the
    ghost. Otherwise the oldest of ``main`` goes; each read since spares it one round.

    Naming victims only walks the queues. What the walk passed over is kept with each victim, and
    moved when that victim is removed; a walk whose victims stay leaves everything as it was.
    """

    def __init__(self, num_slots: int, *, small_share: float = SMALL_SHARE) -> None:
        """Know no slot.

        Args:
            num_slots: Slots of the pool; bounds the ghost.
            small_share: Of the known slots, what blocks that were never read may hold when others
                have to go for them; above 0 and below 1.
        """
        if not 0.0 < small_share < 1.0:
            raise ValueError(f"must be above 0 and below 1. small_share={small_share}")
        self._small_share = small_share
        self._small: OrderedDict[int, int] = OrderedDict()
        """Slot to uses, oldest first; likewise ``_main``."""
        self._main: OrderedDict[int, int] = OrderedDict()
        self._fingerprints: dict[int, int] = {}
        self._ghost: OrderedDict[int, None] = OrderedDict()
        self._ghost_max = max(1, round((1 - small_share) * num_slots))
        self._passed: dict[int, list[int]] = {}
        """Victims of the last walk, and what it passed over just before each."""

    def added(self, slot: int, fingerprint: int) -> None:
        """Put a block last: in ``main`` if it left ``small`` a while ago, else in ``small``."""
        self._fingerprints[slot] = fingerprint
        if fingerprint in self._ghost:
            del self._ghost[fingerprint]
            self._main[slot] = 0
        else:
            self._small[slot] = 0

    def used(self, slot: int) -> None:
        """Count the use; nothing moves."""
        queue = self._small if slot in self._small else self._main
        if queue[slot] < USES_MAX:
            queue[slot] += 1

    def removed(self, slot: int) -> None:
        """Forget the slot; for a victim, move what was spared before it and remember its block."""
        passed = self._passed.pop(slot, None)
        for spared in passed or ():
            self._spare(spared)
        fingerprint = self._fingerprints.pop(slot)
        if self._small.pop(slot, None) is None:
            del self._main[slot]
        elif passed is not None:
            self._ghost[fingerprint] = None
            if len(self._ghost) > self._ghost_max:
                self._ghost.popitem(last=False)

    def _spare(self, slot: int) -> None:
        """Put a slot that was read last in ``main``; one that changed since the walk may stay."""
        if self._small.get(slot):
            del self._small[slot]
            self._main[slot] = 0
        elif self._main.get(slot):
            self._main[slot] -= 1
            self._main.move_to_end(slot)

    def victims(self, num_slots: int, is_evictable: Callable[[int], bool]) -> list[int]:
        """Walk both queues as if each victim left at once; what may not go stays where it is."""
        small, main = iter(self._small.items()), iter(self._main.items())
        num_small, num_known = len(self._small), len(self._fingerprints)
        spared: deque[tuple[int, int]] = deque()  # the end of `main`, as far as the walk moved it
        found: list[int] = []
        passed: list[int] = []
        self._passed = {}
        while len(found) < num_slots:
            entry = next(small, None) if num_small > self._small_share * num_known else None
            is_small = entry is not None
            if entry is None:
                entry = next(main, None) or (spared.popleft() if spared else None)
            if entry is None:
                entry = next(small, None)
                is_small = True
            if entry is None:
                break
            slot, num_uses = entry
            if not is_evictable(slot):
                continue
            num_small -= is_small
            if num_uses:
                passed.append(slot)
                spared.append((slot, 0 if is_small else num_uses - 1))
            else:
                num_known -= 1
                found.append(slot)
                self._passed[slot] = passed
                passed = []
        return found
