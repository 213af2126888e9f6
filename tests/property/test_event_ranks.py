"""However the ranks of an engine store, remove and are lost: it holds what any of them holds."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kvkeep.router.events.block_events import AllBlocksCleared, BlockRemoved, BlockStored
from kvkeep.router.events.ranks import RankBlocks, ranks_of
from kvkeep.router.prefix_hashes import token_hashes, token_root
from kvkeep.router.prefix_index import PrefixIndex

BLOCK_TOKENS, NUM_BLOCKS, NUM_RANKS = 2, 4, 3
TOKENS = list(range(BLOCK_TOKENS * NUM_BLOCKS))
PREFIX = token_hashes(TOKENS, BLOCK_TOKENS, token_root())
ENGINE = "engine"

RANK, BLOCK = st.integers(0, NUM_RANKS - 1), st.integers(0, NUM_BLOCKS - 1)
STEPS = st.one_of(
    st.tuples(st.just("store"), RANK, BLOCK),
    st.tuples(st.just("remove"), RANK, BLOCK),
    st.tuples(st.sampled_from(["clear", "drop"]), RANK, st.just(0)),
)


@given(st.lists(STEPS, max_size=40))
def test_an_engine_holds_what_any_rank_holds(steps: list[tuple[str, int, int]]) -> None:
    """Copies are removed one by one; a block whose parent its rank does not have is not placed."""
    index = PrefixIndex(BLOCK_TOKENS)
    ranks = ranks_of(index, NUM_RANKS, 100)
    held: list[Counter[int]] = [Counter() for _ in ranks]
    for what, rank, block in steps:
        told, own = ranks[rank], held[rank]
        assert isinstance(told, RankBlocks)
        name = 100 * (rank + 1) + block
        if what == "store":
            tokens = TOKENS[block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS]
            told.apply(
                ENGINE, BlockStored([name], tokens, BLOCK_TOKENS, name - 1 if block else None)
            )
            own[block] += block == 0 or own[block - 1] > 0
        elif what == "remove":
            told.apply(ENGINE, BlockRemoved([name]))
            own[block] = max(0, own[block] - 1)
        else:
            own.clear()
            if what == "clear":
                told.apply(ENGINE, AllBlocksCleared())
            else:
                told.drop(ENGINE)
        index.check()
        told.check()
        is_held = [any(each[number] for each in held) for number in range(NUM_BLOCKS)]
        depth = is_held.index(False) if False in is_held else NUM_BLOCKS

        assert index.match(PREFIX, [ENGINE]) == [depth]
        assert index.num_blocks(ENGINE) == sum(is_held)
