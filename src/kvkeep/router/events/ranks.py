"""The ranks of one engine, which is data-parallel, as one holder of blocks.

Each rank has a cache, a publisher and numbers of its own, and calls its blocks as it likes; which
rank a request gets is the engine's choice. So a router knows the engine: a block counts as long as
any rank holds it. Here ranks' names of blocks are replaced by the hashes of the blocks' tokens, in
which all ranks agree, and what one rank loses or clears stays known of the others.

Threading and blocking: the event loop's thread; never blocks. Bounded: blocks of each rank; the
oldest go first.
"""

from collections.abc import Sequence

import msgspec

from kvkeep.model.announced import POOL_MEDIUM
from kvkeep.router.events.block_events import (
    ENGINE_MEDIUM,
    AllBlocksCleared,
    BlockEvent,
    BlockRemoved,
    BlockStored,
    Hash,
    extra_key_bytes,
)
from kvkeep.router.events.following import TakesEvents
from kvkeep.router.events.named_blocks import NamedBlocks
from kvkeep.router.events.pool_blocks import number_in
from kvkeep.router.prefix_hashes import token_hashes, token_root

TIERS_MEDIUM = "CPU"
"""Any but the engine's own means the tiers behind it."""


def ranks_of(table: TakesEvents, num_ranks: int, blocks_max: int) -> Sequence[TakesEvents]:
    """Return what each rank of an engine tells its events to.

    Args:
        table: What they feed together, under the engine's name.
        num_ranks: Of the engine; one alone needs nobody in between.
        blocks_max: Blocks known of each rank.
    """
    if num_ranks == 1:
        return [table]
    telling: dict[RankBlocks, None] = {}
    return [RankBlocks(table, blocks_max, telling) for _ in range(num_ranks)]


class RankBlocks:
    """One rank: hands on what it tells, as news of its engine."""

    def __init__(
        self, table: TakesEvents, blocks_max: int, telling: "dict[RankBlocks, None]"
    ) -> None:
        """Know nothing.

        Args:
            table: What all ranks of the engine feed.
            blocks_max: Blocks known of this one, in its cache and in its tiers.
            telling: The ranks of the engine of which something is known; all of them share it.
        """
        self._table, self._blocks_max, self._telling = table, blocks_max, telling
        self._cache, self._tiers = NamedBlocks(), NamedBlocks()

    def apply(self, endpoint: str, event: BlockEvent) -> None:
        """The rank said what it stored or removed."""
        self._telling[self] = None
        match event:
            case AllBlocksCleared():
                self._clear(endpoint)
            case BlockStored() | BlockRemoved() if event.group_idx not in (None, 0):
                self._table.apply(endpoint, event)
            case BlockStored():
                self._store(endpoint, event)
            case BlockRemoved():
                self._remove(endpoint, event)

    def drop(self, endpoint: str) -> None:
        """Nothing is known of the rank any more; of the engine neither if it was the last one."""
        self._telling.pop(self, None)
        self._clear(endpoint)
        if not self._telling:
            self._table.drop(endpoint)

    def _store(self, endpoint: str, event: BlockStored) -> None:
        parent = self._parent_of(event)
        is_odd = len(event.token_ids) != len(event.block_hashes) * event.block_tokens
        if parent is None or is_odd or event.medium == POOL_MEDIUM:
            # What a daemon keeps has one name for all; the rest is refused, and counted, there.
            self._table.apply(endpoint, event)
            return
        blocks = token_hashes(event.token_ids, event.block_tokens, parent, extra_key_bytes(event))
        medium, names = self._named_in(event.medium)
        gone = names.store(map(number_in, event.block_hashes), blocks)
        gone += names.forget_oldest(self._blocks_max)
        first = None if event.parent_block_hash is None else parent
        told = msgspec.structs.replace(event, block_hashes=blocks, parent_block_hash=first)
        self._table.apply(endpoint, told)
        if gone:
            self._tell_gone(endpoint, medium, gone)

    def _parent_of(self, event: BlockStored) -> int | None:
        if event.parent_block_hash is None:
            return token_root(event.lora_name)
        parent = number_in(event.parent_block_hash)
        found = self._cache.block_of(parent)
        return self._tiers.block_of(parent) if found is None else found

    def _remove(self, endpoint: str, event: BlockRemoved) -> None:
        medium, names = self._named_in(event.medium)
        gone, fewer = names.remove(map(number_in, event.block_hashes))
        # Who hears this counts copies itself.
        self._tell_gone(endpoint, medium, gone + fewer)

    def _clear(self, endpoint: str) -> None:
        for medium in (ENGINE_MEDIUM, TIERS_MEDIUM):
            self._tell_gone(endpoint, medium, self._named_in(medium)[1].clear())

    def _tell_gone(self, endpoint: str, medium: str, blocks: Sequence[Hash]) -> None:
        self._table.apply(endpoint, BlockRemoved(list(blocks), medium))

    def _named_in(self, medium: str | None) -> tuple[str, NamedBlocks]:
        if medium in (None, ENGINE_MEDIUM):
            return ENGINE_MEDIUM, self._cache
        return TIERS_MEDIUM, self._tiers

    def check(self) -> None:
        """Raise AssertionError if the tables do not agree."""
        for names in (self._cache, self._tiers):
            assert len(names) <= self._blocks_max
            names.check()
