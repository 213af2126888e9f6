"""What someone who builds on kvkeep sees, through the eyes of a type checker.

`make check` reads this file with mypy, which refuses an ignore that ignores nothing: so each
``type: ignore`` below is a mistake that has to stay a mistake. Running it shows that the names are
there.
"""

from collections.abc import Callable
from typing import assert_type

from kvkeep.core.eviction.base import EvictionPolicy
from kvkeep.model.clock import Clock, SystemClock
from kvkeep.model.errors import CorruptDataError, KvkeepError
from kvkeep.model.ids import BlockHash, BlockKey, LeaseId, Namespace


class OldestFirst:
    """A policy written by somebody else: no base class is needed."""

    def __init__(self) -> None:
        self.slots: list[int] = []

    def added(self, slot: int, fingerprint: int) -> None:
        """Remember a slot."""
        self.slots.append(slot)

    def used(self, slot: int) -> None:
        """Age counts, not use."""

    def removed(self, slot: int) -> None:
        """Forget a slot."""
        self.slots.remove(slot)

    def victims(self, num_slots: int, is_evictable: Callable[[int], bool]) -> list[int]:
        """Name the oldest."""
        return [slot for slot in self.slots if is_evictable(slot)][:num_slots]


class Forgetful(OldestFirst):
    """Lacks nothing by name, but answers with the wrong type."""

    def victims(  # type: ignore[override]
        self, num_slots: int, is_evictable: Callable[[int], bool]
    ) -> str:
        """Not a list of slots."""
        return ""


def test_a_policy_needs_no_base_class() -> None:
    """Four methods of the right types make a policy; a wrong type is seen before anything runs."""
    policy: EvictionPolicy = OldestFirst()
    policy.added(3, 7)
    wrong: EvictionPolicy = Forgetful()  # type: ignore[assignment]

    assert policy.victims(1, lambda slot: True) == [3]
    assert wrong is not policy


def test_one_identity_is_not_taken_for_another() -> None:
    """A namespace is no block hash and a number is no lease, although the bytes are alike."""
    namespace, block_hash = Namespace(bytes(32)), BlockHash(bytes(32))
    key = BlockKey(namespace, block_hash)
    swapped = BlockKey(block_hash, namespace)  # type: ignore[arg-type]
    lease_id: LeaseId = 7  # type: ignore[assignment]

    assert_type(key.block_hash, BlockHash)
    assert_type(key.group_idx, int)
    assert key == swapped
    assert lease_id == LeaseId(7)


def test_a_clock_is_a_promise_of_one_method() -> None:
    """Whatever tells seconds is a clock; time is a float of seconds."""
    clock: Clock = SystemClock()

    assert_type(clock.now_s(), float)
    assert clock.now_s() <= clock.now_s()


def test_errors_have_one_root() -> None:
    """Whoever catches the root catches every error that kvkeep raises on purpose."""
    error: KvkeepError = CorruptDataError("digest mismatch")

    assert str(error) == "digest mismatch"
