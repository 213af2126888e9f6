"""An engine's prefix cache without bytes: full blocks, references, eviction, events."""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence

import xxhash

from kvkeep.router.events.block_events import (
    AllBlocksCleared,
    BlockEvent,
    BlockRemoved,
    BlockStored,
)


class SimulatedBlockCache:
    """Blocks by the engine's own hashes, least recently used first out, as vLLM keeps them.

    A block is held by the requests that use it and can't be evicted then. Of one sequence the last
    blocks are freed first. Prompts that share a prefix share its blocks.
    """

    def __init__(
        self, num_blocks: int, block_tokens: int, seed: int, tell: Callable[[BlockEvent], None]
    ) -> None:
        """Start empty.

        Args:
            num_blocks: How many there are.
            block_tokens: Tokens per block.
            seed: Of the hashes; engines with different ones have nothing in common.
            tell: Called with each event.
        """
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        self._seed, self._tell = seed, tell
        self._holders: dict[int, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict()

    def hashes_of(self, token_ids: Sequence[int]) -> list[int]:
        """Return the engine's hashes of the full blocks of a sequence."""
        parent, hashes = self._seed, []
        tokens = array("I", token_ids).tobytes()
        size = 4 * self.block_tokens
        for start in range(0, len(tokens) - size + 1, size):
            parent = xxhash.xxh3_64_intdigest(tokens[start : start + size], seed=parent)
            hashes.append(parent)
        return hashes

    def depth(self, hashes: Sequence[int]) -> int:
        """Return how many leading blocks are there."""
        return next(
            (idx for idx, block in enumerate(hashes) if block not in self._holders), len(hashes)
        )

    def take(self, hashes: Sequence[int], token_ids: Sequence[int]) -> bool:
        """Hold the blocks of a sequence, storing those that are missing; False if there is no room.

        Args:
            hashes: ``hashes_of(token_ids)``.
            token_ids: The sequence.
        """
        depth = self.depth(hashes)
        missing = [block for block in hashes[depth:] if block not in self._holders]
        idle = sum(block in self._free for block in hashes)
        if len(self._holders) - len(self._free) + idle + len(missing) > self.num_blocks:
            return False
        for block in hashes:
            if block in self._holders:
                self._holders[block] += 1
                self._free.pop(block, None)
        self._evict(len(self._holders) + len(missing) - self.num_blocks)
        for block in missing:
            self._holders[block] = 1
        if depth < len(hashes):
            self._tell(
                BlockStored(
                    block_hashes=list(hashes[depth:]),
                    token_ids=list(
                        token_ids[depth * self.block_tokens : len(hashes) * self.block_tokens]
                    ),
                    block_tokens=self.block_tokens,
                    parent_block_hash=hashes[depth - 1] if depth else None,
                    medium="GPU",
                )
            )
        return True

    def _evict(self, num_blocks: int) -> None:
        evicted: list[int | bytes] = []
        for _ in range(max(0, num_blocks)):
            block, _ = self._free.popitem(last=False)
            del self._holders[block]
            evicted.append(block)
        if evicted:
            self._tell(BlockRemoved(evicted, "GPU"))

    def give_back(self, hashes: Sequence[int]) -> None:
        """Let go of blocks that were taken."""
        for block in reversed(hashes):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None

    def clear(self) -> None:
        """Forget every block; nobody may hold any."""
        self._holders.clear()
        self._free.clear()
        self._tell(AllBlocksCleared())

    @property
    def num_used(self) -> int:
        """Blocks that are held or could be found again."""
        return len(self._holders)

    @property
    def num_held(self) -> int:
        """Blocks that some request holds."""
        return len(self._holders) - len(self._free)

    def check(self) -> None:
        """Raise AssertionError if the tables do not agree."""
        assert len(self._holders) <= self.num_blocks
        assert {block for block, count in self._holders.items() if not count} == set(self._free)
