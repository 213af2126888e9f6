"""The order in which the least recently used policy names slots."""

from kvkeep.core.eviction.lru import LruPolicy


def test_the_oldest_goes_first() -> None:
    """Slots are named in the order in which they were last used."""
    policy = LruPolicy()
    for slot in (4, 2, 9):
        policy.added(slot, slot)
    policy.used(4)

    assert policy.victims(3, lambda _: True) == [2, 9, 4]


def test_lent_slots_are_looked_past() -> None:
    """The oldest slot that may go goes, though an older one is lent."""
    policy = LruPolicy()
    for slot in range(4):
        policy.added(slot, slot)

    assert policy.victims(2, lambda slot: slot != 0) == [1, 2]
