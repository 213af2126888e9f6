"""Slots of the pool as a tier sees them: a value is the digests of a block and then its bytes."""

from collections.abc import Sequence

from kvkeep.tiers.base import Parts
from kvkeep.tiers.shared_memory import PoolView
from kvkeep.tiers.slot_header import DIGEST_BYTES


def value_bytes(view: PoolView) -> int:
    """Length of every value of this pool's layout."""
    layout = view.geometry.layout
    return layout.num_pages * DIGEST_BYTES + layout.block_bytes


def parts_of(view: PoolView, slot: int) -> Parts:
    """A slot's digests and payload, as they lie in the pool: nothing is copied."""
    return [view.digests[slot].data.cast("B"), view.payload(slot).data]


def all_parts(view: PoolView, slots: Sequence[int]) -> list[Parts]:
    """``parts_of`` each slot."""
    return [parts_of(view, slot) for slot in slots]
