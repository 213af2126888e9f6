"""Each fault changes a block in its own way, or says that it can't."""

from random import Random

import numpy as np
import pytest

from kvkeep.validate.self_test.faults import Block, Donors, PlantedFault, spoiled


def block(seed: int, heads: int = 3) -> Block:
    return np.random.default_rng(seed).integers(0, 256, (4, heads, 64)).astype(np.uint8)


DONORS = Donors(neighbor=block(2), earlier=block(3), foreign=block(4))


@pytest.mark.parametrize("fault", list(PlantedFault))
def test_every_fault_changes_the_block_and_not_the_original(fault: PlantedFault) -> None:
    """What is planted differs, and what it was made from stays."""
    right = block(1)

    wrong = spoiled(fault, right, DONORS, Random(1))

    assert wrong is not None
    assert not np.array_equal(wrong, right)
    assert np.array_equal(right, block(1))


def test_pages_of_the_wrong_place_are_all_there() -> None:
    """A wrong layer or head has every page, one place further on."""
    right = block(1)
    layer = spoiled(PlantedFault.WRONG_LAYER, right, DONORS, Random(1))
    head = spoiled(PlantedFault.WRONG_HEAD, right, DONORS, Random(1))

    assert layer is not None
    assert head is not None
    assert np.array_equal(layer[1], right[0])
    assert np.array_equal(head[:, 1], right[:, 0])


def test_a_single_bit_is_one() -> None:
    """Anywhere in the block."""
    wrong = spoiled(PlantedFault.SINGLE_BIT, block(1), DONORS, Random(1))

    assert wrong is not None
    assert int(np.unpackbits(wrong ^ block(1)).sum()) == 1


def test_a_truncated_block_begins_right() -> None:
    """Its last third is missing."""
    wrong = spoiled(PlantedFault.TRUNCATED, block(1), DONORS, Random(1))

    assert wrong is not None
    kept = wrong.size * 2 // 3
    assert np.array_equal(wrong.reshape(-1)[:kept], block(1).reshape(-1)[:kept])
    assert not wrong.reshape(-1)[kept:].any()


@pytest.mark.parametrize(
    "fault", [PlantedFault.SWAPPED, PlantedFault.STALE, PlantedFault.WRONG_TENANT]
)
def test_without_a_donor_there_is_no_fault(fault: PlantedFault) -> None:
    """Nothing is planted that would not be one."""
    assert spoiled(fault, block(1), Donors(), Random(1)) is None
    assert spoiled(fault, block(1), Donors(block(1), block(1), block(1)), Random(1)) is None


def test_one_head_cannot_be_the_wrong_one() -> None:
    """A model with one KV head has no other to be mistaken for."""
    assert spoiled(PlantedFault.WRONG_HEAD, block(1, heads=1), DONORS, Random(1)) is None
