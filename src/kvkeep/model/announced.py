"""How daemons, engines and routers name stored blocks to each other in events.

A number stands for a block of the pool: the first 64 bits of its hash, which is keyed where the
tenant has a secret. It says nothing of tokens; only an engine that computed or loaded the block
can tell a router what it is of. Numbers are hints: nothing is read by them.
"""

from typing import Final

from kvkeep.model.ids import BlockHash

POOL_MEDIUM: Final = "KVKEEP"
"""Of events about blocks that a daemon keeps, in its pool or in tiers below it."""
NUMBER_BYTES: Final = 8


def number_of(block_hash: BlockHash) -> int:
    """Return the number of a block."""
    return int.from_bytes(block_hash[:NUMBER_BYTES], "big")
