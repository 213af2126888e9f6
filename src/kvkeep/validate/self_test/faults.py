"""The faults that are planted, as changes of one block's bytes. Pure.

Each is one that a medium, a race or a slip in somebody's arithmetic has in store. What is planted
differs from what was there in at least one bit, or is not planted.
"""

from dataclasses import dataclass
from enum import StrEnum
from random import Random

import numpy as np
import numpy.typing as npt

Block = npt.NDArray[np.uint8]
"""uint8 ``[num_layers, num_heads, page_bytes]``."""
KEPT_SHARE = 2 / 3
"""Of a truncated block."""


class PlantedFault(StrEnum):
    """What is wrong with a block; the value is its name in tables and reports."""

    SWAPPED = "swapped"
    """Another prompt's block at the same place."""
    STALE = "stale"
    """What another block of the same prompt left: bytes that were never written over."""
    ZEROED = "zeroed"
    """No bytes were ever written."""
    TRUNCATED = "truncated"
    """The last third is missing."""
    WRONG_LAYER = "wrong layer"
    """Each layer has the next one's pages."""
    WRONG_HEAD = "wrong head"
    """Each KV head has the next one's page."""
    WRONG_TENANT = "wrong tenant"
    """A block that belongs to somebody else."""
    SINGLE_BIT = "single bit"
    """One bit, anywhere."""


BLOCK_SIZED = frozenset(PlantedFault) - {PlantedFault.SINGLE_BIT}
"""Too large for any answer to be the same; a single bit may vanish in rounding."""
FROM_ANOTHER = frozenset({PlantedFault.SWAPPED, PlantedFault.STALE, PlantedFault.WRONG_TENANT})
"""Whole blocks of somebody else, which come with digests that are right for them."""


@dataclass(frozen=True, slots=True)
class Donors:
    """Where wrong bytes may come from; None: there is no such block."""

    neighbor: Block | None = None
    """Of another prompt."""
    earlier: Block | None = None
    """Of the same prompt, at another place."""
    foreign: Block | None = None
    """Of another tenant."""


def spoiled(fault: PlantedFault, block: Block, donors: Donors, chance: Random) -> Block | None:
    """The block with a fault.

    Args:
        fault: Which.
        block: As it is right; not changed.
        donors: Blocks to take wrong bytes from.
        chance: Decides which bit.

    Returns:
        A new array; None where this fault can't be made here, as a wrong head of a model with one
        KV head.
    """
    made = _made(fault, block, donors, chance)
    if made is None or np.array_equal(made, block):
        return None
    return made


def _made(fault: PlantedFault, block: Block, donors: Donors, chance: Random) -> Block | None:
    taken = {
        PlantedFault.SWAPPED: donors.neighbor,
        PlantedFault.STALE: donors.earlier,
        PlantedFault.WRONG_TENANT: donors.foreign,
    }
    if fault in taken:
        donor = taken[fault]
        return None if donor is None else donor.copy()
    match fault:
        case PlantedFault.ZEROED:
            return np.zeros_like(block)
        case PlantedFault.WRONG_LAYER:
            return np.roll(block, 1, axis=0)
        case PlantedFault.WRONG_HEAD:
            return np.roll(block, 1, axis=1)
    made = block.copy()
    flat = made.reshape(-1)
    if fault is PlantedFault.TRUNCATED:
        flat[int(len(flat) * KEPT_SHARE) :] = 0
    else:
        flat[chance.randrange(len(flat))] ^= 1 << chance.randrange(8)
    return made
