"""A slot as a tier sees it."""

from kvkeep.daemon.movement.slots import all_parts, parts_of, value_bytes
from kvkeep.tiers.base import length_of
from tests.unit.daemon.movement.grounds import LAYOUT, Grounds, keys, payload


async def test_a_value_is_digests_and_bytes(grounds: Grounds) -> None:
    """Its length follows from the layout: 16 bytes for each page and the block."""
    block = keys(5, 1)[0]
    grounds.store([block])
    slot = grounds.node.ledger.find(block)
    assert slot is not None
    value = b"".join(parts_of(grounds.view, slot.idx))

    assert len(value) == value_bytes(grounds.view) == 16 * 4 + LAYOUT.block_bytes
    assert value.endswith(payload(block))


async def test_parts_are_the_pools_own_memory(grounds: Grounds) -> None:
    """What is read into them is in the pool, and in no other slot."""
    one, two = all_parts(grounds.view, [0, 1])
    for part in one:
        part[:] = b"\1" * part.nbytes

    assert bytes(grounds.view.payload(0)) == b"\1" * LAYOUT.block_bytes
    assert length_of(one) == length_of(two)
    assert not any(b"".join(two))
