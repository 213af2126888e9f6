"""What is believed of a tier behind a network."""

from kvkeep.daemon.movement.known_keys import KNOWN_MAX, KnownKeys
from kvkeep.model.ids import BlockHash, BlockKey, Namespace


def keys(count: int) -> list[BlockKey]:
    """Keys of some blocks."""
    namespace = Namespace(bytes(32))
    return [BlockKey(namespace, BlockHash(n.to_bytes(32, "big")), 0) for n in range(count)]


def test_no_more_is_believed_than_a_tier_holds() -> None:
    """A server that evicts says nothing: the keys that were told longest ago are given up."""
    known = KnownKeys(3)
    told = keys(5)

    for key in told:
        known.learn([key], [True])

    assert known.keys() == told[2:]


def test_a_tier_without_end_is_believed_a_bounded_number() -> None:
    """Memory does not grow with the size of a store."""
    known = KnownKeys(1 << 60)
    told = keys(KNOWN_MAX + 1)

    known.learn(told, [True] * len(told))

    assert len(known.keys()) == KNOWN_MAX
    assert told[0] not in known
