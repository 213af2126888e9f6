"""Data-parallel ranks of one engine: it holds what any of them holds."""

import pytest

from kvkeep.model.announced import POOL_MEDIUM
from kvkeep.router.events.block_events import AllBlocksCleared, BlockRemoved, BlockStored
from kvkeep.router.events.ranks import RankBlocks, ranks_of
from kvkeep.router.prefix_hashes import token_hashes, token_root
from kvkeep.router.prefix_index import PrefixIndex

BLOCK_TOKENS = 4
TOKENS = list(range(3 * BLOCK_TOKENS))
PREFIX = token_hashes(TOKENS, BLOCK_TOKENS, token_root())
ENGINE = "engine"


class Engine:
    """Ranks that give names of their own to the blocks of one prompt."""

    def __init__(self, num_ranks: int = 2, blocks_max: int = 100) -> None:
        self.index = PrefixIndex(BLOCK_TOKENS)
        self.ranks = ranks_of(self.index, num_ranks, blocks_max)

    def stores(self, rank: int, first: int, end: int, medium: str | None = "GPU") -> None:
        names = [self.name(rank, idx) for idx in range(first, end)]
        tokens = TOKENS[first * BLOCK_TOKENS : end * BLOCK_TOKENS]
        parent = self.name(rank, first - 1) if first else None
        event = BlockStored([*names], tokens, BLOCK_TOKENS, parent, medium=medium)
        self.ranks[rank].apply(ENGINE, event)

    def removes(self, rank: int, *blocks: int, medium: str | None = "GPU") -> None:
        names = [self.name(rank, idx) for idx in blocks]
        self.ranks[rank].apply(ENGINE, BlockRemoved([*names], medium))

    @staticmethod
    def name(rank: int, block: int) -> int:
        return 1000 * (rank + 1) + block

    @property
    def depth(self) -> int:
        """Leading blocks of the prompt that the engine is known to hold."""
        self.index.check()
        for rank in self.ranks:
            assert isinstance(rank, RankBlocks)
            rank.check()
        return self.index.match(PREFIX, [ENGINE])[0]


@pytest.fixture
def engine() -> Engine:
    """One with two ranks of which nothing is known."""
    return Engine()


def test_one_rank_alone_needs_nobody_in_between() -> None:
    """Its events go to the table as they are."""
    index = PrefixIndex(BLOCK_TOKENS)

    assert ranks_of(index, 1, 100) == [index]


def test_a_block_is_held_as_long_as_any_rank_has_it(engine: Engine) -> None:
    """Though each calls it by another name, and removes only its own."""
    engine.stores(0, 0, 3)
    engine.stores(1, 0, 2)
    engine.removes(0, 0, 1, 2)
    assert engine.depth == 2
    engine.removes(1, 1)

    assert engine.depth == 1
    assert engine.index.num_blocks(ENGINE) == 1


def test_a_rank_that_holds_a_block_twice_removes_it_twice(engine: Engine) -> None:
    """Two requests that computed one prefix at the same time both stored it."""
    engine.stores(0, 0, 1)
    engine.stores(0, 0, 1)
    engine.removes(0, 0)
    assert engine.depth == 1
    engine.removes(0, 0)
    assert engine.depth == 0
    engine.removes(0, 0)

    assert engine.depth == 0


def test_a_rank_that_is_cleared_takes_nothing_from_the_others(engine: Engine) -> None:
    """Copies of its own included; cleared all, nothing is left."""
    engine.stores(0, 0, 3)
    engine.stores(0, 0, 1)
    engine.stores(1, 0, 1)
    engine.ranks[0].apply(ENGINE, AllBlocksCleared())
    assert engine.depth == 1
    engine.ranks[1].apply(ENGINE, AllBlocksCleared())

    assert engine.depth == 0
    assert engine.index.has_events(ENGINE)


def test_a_rank_whose_events_were_lost_is_forgotten_alone(engine: Engine) -> None:
    """And the engine with the last of them: it is routed by the router's own choices then."""
    engine.stores(0, 0, 3)
    engine.stores(1, 0, 2)
    engine.ranks[0].drop(ENGINE)
    assert (engine.depth, engine.index.has_events(ENGINE)) == (2, True)
    engine.ranks[1].drop(ENGINE)

    assert (engine.depth, engine.index.has_events(ENGINE)) == (0, False)


def test_a_block_may_follow_one_that_only_another_place_has(engine: Engine) -> None:
    """A rank's tiers continue its cache; another rank's names mean nothing to it."""
    engine.stores(0, 0, 1)
    engine.stores(0, 1, 2, medium="CPU")
    engine.stores(1, 2, 3)
    assert engine.index.match_tiers(PREFIX, [ENGINE]) == [2]
    assert engine.index.num_orphans == 1
    engine.stores(0, 2, 3)
    assert engine.index.match_tiers(PREFIX, [ENGINE]) == [3]
    engine.removes(0, 1, medium="CPU")

    assert engine.index.match_tiers(PREFIX, [ENGINE]) == [1]


def test_a_rank_that_says_more_than_there_is_room_for_loses_the_oldest() -> None:
    """What it says lies within its bound, and what is forgotten is forgotten everywhere."""
    engine = Engine(blocks_max=2)
    engine.stores(0, 0, 3)

    assert engine.depth == 0
    assert engine.index.num_blocks(ENGINE) == 2


def test_what_is_refused_is_refused_by_the_table(engine: Engine) -> None:
    """And counted there: blocks of another length, or with too few tokens."""
    engine.ranks[0].apply(ENGINE, BlockStored([1], TOKENS[:2], BLOCK_TOKENS))
    engine.ranks[1].apply(ENGINE, BlockStored([1], TOKENS[:8], 8))

    assert engine.index.num_refused == 2
    assert engine.depth == 0


def test_what_a_daemon_keeps_has_one_name_for_all_ranks(engine: Engine) -> None:
    """The daemon says the numbers that any rank announced."""
    engine.index.pools.joined(ENGINE, "here")
    named = BlockStored([7], TOKENS[:BLOCK_TOKENS], BLOCK_TOKENS, medium=POOL_MEDIUM)
    engine.ranks[1].apply(ENGINE, named)
    engine.index.pools.apply("here", BlockStored([7], [], 1, medium=POOL_MEDIUM))

    assert engine.index.match_tiers(PREFIX, [ENGINE]) == [1]


def test_other_groups_of_a_hybrid_model_are_no_blocks(engine: Engine) -> None:
    """The first one stands for all."""
    event = BlockStored([1], TOKENS[:BLOCK_TOKENS], BLOCK_TOKENS, group_idx=1)
    engine.ranks[0].apply(ENGINE, event)

    assert engine.depth == 0
    assert engine.index.has_events(ENGINE)
