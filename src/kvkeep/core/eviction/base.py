"""The seam between the ledger and an eviction policy."""

from collections.abc import Callable
from typing import Protocol

from kvkeep.model.ids import BlockKey

_FINGERPRINT_BYTES = 8


def fingerprint_of(key: BlockKey) -> int:
    """A number below 2**64 that stands for a block where only use is remembered, never for bytes.

    Equal for equal keys. Block hashes are keyed digests, so their first bytes are as good as
    random, and nobody without the tenant's key can aim at another block's; two blocks that meet by
    chance share a memory of use, which costs at worst one wrong choice of victim.
    """
    return int.from_bytes(key.block_hash[:_FINGERPRINT_BYTES], "little") ^ key.group_idx


class EvictionPolicy(Protocol):
    """Orders slots by how soon they should make room.

    What it is: a memory of use. It knows slots and fingerprints of blocks, never bytes or keys.

    Life of one slot: ``added`` once, ``used`` any number of times, ``removed`` once.

    The caller guarantees: ``used`` and ``removed`` only name slots that were added. Slots that were
    named as victims are removed in the order in which they were named, if at all.

    The implementer must: name each slot at most once per call of ``victims``; forget no slot that
    was not removed; keep no more per slot and beyond slots than a fixed multiple of the slots
    there are; need O(1) per call and, in ``victims``, per slot looked at.

    Threading and blocking: one thread; never blocks.
    """

    def added(self, slot: int, fingerprint: int) -> None:
        """The block with this ``fingerprint_of`` its key became readable in this slot."""
        ...

    def used(self, slot: int) -> None:
        """The block in this slot was read."""
        ...

    def removed(self, slot: int) -> None:
        """The block in this slot is gone."""
        ...

    def victims(self, num_slots: int, is_evictable: Callable[[int], bool]) -> list[int]:
        """Name up to ``num_slots`` slots to empty, best first; changes no later answer."""
        ...
