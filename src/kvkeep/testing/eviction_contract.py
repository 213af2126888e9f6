"""What every ``EvictionPolicy`` promises, as tests to inherit.

class TestMyPolicy(EvictionContract):
    @pytest.fixture
    def policy(self) -> EvictionPolicy:
        return MyPolicy()
"""

from random import Random

import pytest

from kvkeep.core.eviction.base import EvictionPolicy


def everything(_slot: int) -> bool:
    """Any slot may be emptied."""
    return True


class EvictionContract:
    """Inherit, and give a ``policy`` that knows no slot yet."""

    @pytest.fixture
    def policy(self) -> EvictionPolicy:
        """Return the policy under test."""
        raise NotImplementedError("a subclass of EvictionContract gives the fixture `policy`")

    def test_nothing_is_named_of_nothing(self, policy: EvictionPolicy) -> None:
        """A policy that knows no slot names none."""
        assert policy.victims(5, everything) == []

    def test_every_slot_is_named_once(self, policy: EvictionPolicy) -> None:
        """Asked for as many as there are, or more, a policy names each slot it knows once."""
        for slot in (7, 3, 5):
            policy.added(slot, slot)
        policy.used(3)

        assert sorted(policy.victims(3, everything)) == [3, 5, 7]
        assert sorted(policy.victims(100, everything)) == [3, 5, 7]

    def test_no_more_are_named_than_asked_for(self, policy: EvictionPolicy) -> None:
        """The caller empties all that is named, so a policy names no more than needed."""
        for slot in range(5):
            policy.added(slot, slot)

        assert len(policy.victims(2, everything)) == 2
        assert policy.victims(0, everything) == []

    def test_only_evictable_slots_are_named(self, policy: EvictionPolicy) -> None:
        """A lent slot is passed over, and another is found behind it."""
        for slot in range(6):
            policy.added(slot, slot)

        assert sorted(policy.victims(6, lambda slot: slot % 2 == 1)) == [1, 3, 5]
        assert policy.victims(1, lambda slot: slot == 4) == [4]
        assert policy.victims(1, lambda _: False) == []

    def test_naming_changes_nothing(self, policy: EvictionPolicy) -> None:
        """A question asked twice is answered twice alike."""
        for slot in range(6):
            policy.added(slot, slot)
        policy.used(2)
        first = policy.victims(4, everything)

        assert policy.victims(4, everything) == first
        assert sorted(policy.victims(6, everything)) == list(range(6))

    def test_what_was_removed_is_not_named(self, policy: EvictionPolicy) -> None:
        """A slot is known from ``added`` to ``removed``, and may come back."""
        policy.added(1, 1)
        policy.added(2, 2)
        policy.removed(1)
        assert policy.victims(2, everything) == [2]

        policy.added(1, 1)
        assert sorted(policy.victims(2, everything)) == [1, 2]

    @pytest.mark.parametrize("seed", range(5))
    def test_nothing_is_forgotten(self, policy: EvictionPolicy, seed: int) -> None:
        """After any life of many slots, a policy knows exactly those that are left."""
        chance = Random(seed)
        known: list[int] = []
        for _ in range(500):
            slot = chance.randrange(20)
            if slot not in known:
                policy.added(slot, slot)
                known.append(slot)
            elif chance.random() < 0.5:
                policy.used(slot)
            else:
                policy.removed(slot)
                known.remove(slot)
            assert sorted(policy.victims(100, everything)) == sorted(known)
