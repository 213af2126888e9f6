"""What S3-FIFO keeps and what it lets go."""

import pytest

from kvkeep.core.eviction.base import fingerprint_of
from kvkeep.core.eviction.s3fifo import S3FifoPolicy
from kvkeep.model.ids import BlockHash, BlockKey, Namespace


def everything(_slot: int) -> bool:
    return True


def filled(num_slots: int) -> S3FifoPolicy:
    """A full pool: slot ``i`` holds the block with fingerprint ``100 + i``."""
    policy = S3FifoPolicy(num_slots)
    for slot in range(num_slots):
        policy.added(slot, 100 + slot)
    return policy


def evict(policy: S3FifoPolicy, num_slots: int) -> list[int]:
    victims = policy.victims(num_slots, everything)
    for slot in victims:
        policy.removed(slot)
    return victims


def test_what_was_never_read_goes_first() -> None:
    """Blocks leave in the order they came, but those that were read are passed over."""
    policy = filled(10)
    policy.used(0)
    policy.used(2)

    assert policy.victims(4, everything) == [1, 3, 4, 5]


def test_a_read_block_outlives_blocks_that_came_later() -> None:
    """Once passed over, a block stays in the main queue while unread blocks come and go."""
    policy = filled(10)
    policy.used(0)
    for fingerprint in range(1000, 1050):
        (slot,) = evict(policy, 1)
        assert slot != 0
        policy.added(slot, fingerprint)

    assert 0 not in policy.victims(9, everything)


def test_a_block_that_comes_back_skips_probation() -> None:
    """What left the small queue and is stored again lands in the main queue."""
    policy = filled(10)
    assert evict(policy, 2) == [0, 1]
    policy.added(0, 100)
    policy.added(1, 999)

    assert policy.victims(10, everything)[-2:] == [1, 0]


def test_a_deleted_block_is_not_remembered() -> None:
    """A block that was deleted on request was never judged, so it starts anew."""
    policy = filled(10)
    policy.removed(0)
    policy.removed(1)
    policy.added(0, 100)
    policy.added(1, 999)

    assert policy.victims(10, everything)[-2:] == [0, 1]


def test_reads_are_worn_off() -> None:
    """A block in the main queue that nobody reads any more goes in the end."""
    policy = filled(10)
    for _ in range(9):
        policy.used(0)
    gone: list[int] = []
    for fingerprint in range(1000, 1100):
        (slot,) = evict(policy, 1)
        gone.append(slot)
        policy.added(slot, 2000 + fingerprint % 15)  # known again and again: to the main queue

    assert 0 in gone


def test_the_main_queue_starts_counting_anew() -> None:
    """Reads in the small queue buy one promotion, however many they were."""
    policy = filled(10)
    for slot in (0, 0, 0, 1):
        policy.used(slot)

    assert policy.victims(10, everything)[-2:] == [0, 1]


def test_naming_moves_nothing() -> None:
    """A walk whose victims stay leaves uses and queues as they were."""
    policy = filled(10)
    for slot in (0, 1, 2):
        policy.used(slot)
    first = policy.victims(10, everything)
    policy.victims(3, everything)

    assert policy.victims(10, everything) == first
    assert set(first[:6]) <= set(range(3, 10))


def test_a_lent_block_keeps_its_place() -> None:
    """What may not go now is looked past, and is the next to go once it may."""
    policy = filled(10)

    assert policy.victims(2, lambda slot: slot != 0) == [1, 2]
    assert policy.victims(1, everything) == [0]


def test_the_ghost_is_bounded() -> None:
    """However many blocks pass through, no more are remembered than the main queue holds."""
    policy = filled(10)
    for fingerprint in range(1000, 2000):
        (slot,) = evict(policy, 1)
        policy.added(slot, fingerprint)

    assert len(policy._ghost) == 9


def test_fingerprints_tell_blocks_apart() -> None:
    """Another hash or another group is another fingerprint; equal keys have equal ones."""
    namespace = Namespace(bytes(32))
    first = BlockKey(namespace, BlockHash(bytes(32)))
    others = [
        BlockKey(namespace, BlockHash(b"\2" * 32)),
        BlockKey(namespace, BlockHash(bytes(32)), 1),
    ]

    assert fingerprint_of(first) == fingerprint_of(BlockKey(namespace, BlockHash(bytes(32))))
    assert len({fingerprint_of(key) for key in (first, *others)}) == 3


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_both_queues_need_room(share: float) -> None:
    """A share that leaves one queue nothing is a mistake of the caller."""
    with pytest.raises(ValueError, match="small_share"):
        S3FifoPolicy(10, small_share=share)
