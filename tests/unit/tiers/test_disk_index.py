"""Which slot is whose: pins, eviction and what becomes free."""

from kvkeep.core.eviction.lru import LruPolicy
from kvkeep.testing.tier_contract import block_key
from kvkeep.tiers.disk.index import SlotIndex


def filled_index(num_slots: int) -> SlotIndex:
    """As many values as slots: value 1 in slot 0, and so on."""
    index = SlotIndex(LruPolicy())
    index.add_free(range(num_slots))
    for number in range(1, num_slots + 1):
        slot = index.pin_free()
        assert slot is not None
        assert index.put(block_key(number), slot)
        index.unpin(slot)
    return index


def test_the_oldest_value_makes_room() -> None:
    """Its key is gone, and its slot is the caller's until it is unpinned."""
    index = filled_index(3)

    assert index.pin_free() is None
    assert index.pin_evicted() == 0
    assert block_key(1) not in index
    assert index.pin_free() is None
    index.unpin(0)
    assert index.pin_free() == 0


def test_a_read_keeps_a_value() -> None:
    """What was used last goes last."""
    index = filled_index(2)
    assert index.touch(block_key(1))

    assert index.pin_evicted() == 1


def test_a_pinned_slot_is_not_evicted() -> None:
    """A reader keeps its slot; with readers everywhere there is no room."""
    index = filled_index(2)
    pinned = index.pin(block_key(1))
    index.touch(block_key(2))

    assert pinned == 0
    assert index.pin_evicted() == 1
    assert index.pin_evicted() is None


def test_a_deleted_value_holds_its_slot_for_its_readers() -> None:
    """The key is gone at once; the slot is free when the last one is done."""
    index = filled_index(1)
    assert index.pin(block_key(1)) == 0
    assert index.pin_deleted(block_key(1)) == 0

    assert block_key(1) not in index
    index.unpin(0)
    assert index.pin_free() is None
    index.unpin(0)
    assert index.pin_free() == 0


def test_the_second_of_two_writers_gives_its_slot_back() -> None:
    """Equal keys hold equal bytes: the first stays."""
    index = SlotIndex(LruPolicy())
    index.add_free(range(2))
    first, second = index.pin_free(), index.pin_free()
    assert first is not None
    assert second is not None

    assert index.put(block_key(1), first)
    assert not index.put(block_key(1), second)
    index.unpin(first)
    index.unpin(second)
    assert (len(index), index.pin_free()) == (1, second)


def test_a_retired_slot_never_comes_back() -> None:
    """It is neither free nor a victim."""
    index = filled_index(1)
    assert index.pin(block_key(1)) == 0
    assert index.drop(0)
    assert not index.drop(0)
    index.retire(0)
    index.unpin(0)

    assert index.pin_free() is None
    assert index.pin_evicted() is None
