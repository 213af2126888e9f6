"""Which blocks the daemons of hosts keep, in their pools and below, as far as a router can know.

A daemon says numbers, which mean nothing by themselves; the engines of the host say what prompts
they stand for (model/announced.py). A block counts once both have spoken, in whichever order.

Threading and blocking: the event loop's thread; never blocks. Bounded: names, and numbers of each
daemon; the oldest go first.
"""

from collections.abc import Sequence
from itertools import islice

from kvkeep.router.events.block_events import (
    AllBlocksCleared,
    BlockEvent,
    BlockRemoved,
    BlockStored,
    Hash,
)
from kvkeep.router.prefix_hashes import HASH_MASK

DROPPED_AT_ONCE = 64
"""One part in so many goes when there is no room."""


class PoolBlocks:
    """Names of blocks, and which daemon has which."""

    def __init__(self, blocks_max: int) -> None:
        """Know nothing.

        Args:
            blocks_max: Names known, and blocks known of each daemon.
        """
        self._blocks_max = blocks_max
        self._names: dict[int, int] = {}
        """From the number of a block to the hash of its tokens, as the index has it."""
        self._unnamed: dict[str, dict[int, None]] = {}
        """By daemon: numbers of which nobody has said yet what they stand for."""
        self._held: dict[str, dict[int, None]] = {}
        """By daemon: hashes of tokens."""
        self._pools: dict[str, str] = {}
        """By endpoint: the daemon of its host."""

    def __len__(self) -> int:
        """Blocks of all daemons whose prompts are known."""
        return sum(map(len, self._held.values()))

    def num_blocks(self, pool: str) -> int:
        """Blocks of one daemon whose prompts are known."""
        return len(self._held.get(pool, ()))

    # ---- who belongs to whom

    def joined(self, endpoint: str, pool: str) -> None:
        """An engine loads from this daemon."""
        self._pools[endpoint] = pool

    def left(self, endpoint: str) -> None:
        """It does no more."""
        self._pools.pop(endpoint, None)

    def is_used(self, pool: str) -> bool:
        """Whether any engine loads from a daemon."""
        return pool in self._pools.values()

    def extend(
        self, prefix: Sequence[int], endpoint: str, depth: int, in_cache: dict[int, int], bits: int
    ) -> int:
        """Return how many leading blocks an endpoint holds or can load.

        Args:
            prefix: Hashes of a prompt's blocks.
            endpoint: Whose.
            depth: Leading blocks that it has anyhow.
            in_cache: For each block, bits of the endpoints that hold it.
            bits: The endpoint's.
        """
        held = self._held.get(self._pools.get(endpoint, ""))
        if not held:
            return depth
        while depth < len(prefix):
            block = prefix[depth]
            if block not in held and not in_cache.get(block, 0) & bits:
                break
            depth += 1
        return depth

    # ---- news

    def name(self, numbers: Sequence[Hash], blocks: Sequence[int]) -> None:
        """An engine said what these numbers stand for."""
        for each, block in zip(numbers, blocks, strict=True):
            number = number_in(each)
            before = self._names.pop(number, block)
            self._names[number] = block
            for pool, unnamed in self._unnamed.items():
                held = self._held[pool]
                if before in held and before != block:
                    del held[before]
                    held[block] = None
                if number in unnamed:
                    del unnamed[number]
                    held[block] = None
        if len(self._names) > self._blocks_max:
            self._forget_names()

    def block_of(self, number: Hash) -> int | None:
        """Return the hash of tokens that a number stands for."""
        return self._names.get(number_in(number))

    def _forget_names(self) -> None:
        for number in _oldest(self._names, self._blocks_max):
            block = self._names.pop(number)
            for held in self._held.values():
                held.pop(block, None)

    def apply(self, pool: str, event: BlockEvent) -> None:
        """A daemon said what it has, or has no more."""
        unnamed = self._unnamed.setdefault(pool, {})
        held = self._held.setdefault(pool, {})
        match event:
            case AllBlocksCleared():
                unnamed.clear()
                held.clear()
            case BlockStored():
                for each in event.block_hashes:
                    block = self.block_of(each)
                    if block is None:
                        unnamed[number_in(each)] = None
                    else:
                        held[block] = None
            case BlockRemoved():
                for each in event.block_hashes:
                    unnamed.pop(number_in(each), None)
                    held.pop(self._names.get(number_in(each), -1), None)
        for table in (unnamed, held):
            if len(table) > self._blocks_max:
                for oldest in _oldest(table, self._blocks_max):
                    del table[oldest]

    def drop(self, pool: str) -> None:
        """Nothing is known of a daemon any more."""
        self._unnamed.pop(pool, None)
        self._held.pop(pool, None)

    def check(self) -> None:
        """Raise AssertionError if the tables do not agree."""
        assert len(self._names) <= self._blocks_max
        assert self._unnamed.keys() == self._held.keys()
        for unnamed in self._unnamed.values():
            assert len(unnamed) <= self._blocks_max
            assert not unnamed.keys() & self._names.keys()
        named = set(self._names.values())
        for held in self._held.values():
            assert len(held) <= self._blocks_max
            assert held.keys() <= named


def number_in(announced: Hash) -> int:
    """Return a number below 2**60, whichever form it was published in."""
    if isinstance(announced, bytes):
        announced = int.from_bytes(announced[-8:], "big")
    return announced & HASH_MASK


def _oldest(table: dict[int, int] | dict[int, None], room: int) -> list[int]:
    return list(islice(table, len(table) - room + room // DROPPED_AT_ONCE))
