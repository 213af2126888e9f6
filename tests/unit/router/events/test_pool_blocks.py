"""Blocks count once a daemon has said that it has them, and an engine what they are of."""

from collections.abc import Callable

import pytest

from kvkeep.model.announced import POOL_MEDIUM
from kvkeep.router.events.block_events import AllBlocksCleared, BlockRemoved, BlockStored
from kvkeep.router.events.pool_blocks import PoolBlocks
from kvkeep.router.prefix_hashes import token_hashes, token_root
from kvkeep.router.prefix_index import PrefixIndex

BLOCK_TOKENS = 4
TOKENS = list(range(4 * BLOCK_TOKENS))
PREFIX = token_hashes(TOKENS, BLOCK_TOKENS, token_root())
NUMBERS = [101, 102, 103, 104]


def kept(*numbers: int) -> BlockStored:
    """As a daemon says it."""
    return BlockStored(list(numbers), [], 1, medium=POOL_MEDIUM)


def named(first: int = 0, end: int = 4) -> BlockStored:
    """As an engine says it."""
    parent = NUMBERS[first - 1] if first else None
    tokens = TOKENS[first * BLOCK_TOKENS : end * BLOCK_TOKENS]
    return BlockStored(list(NUMBERS[first:end]), tokens, BLOCK_TOKENS, parent, medium=POOL_MEDIUM)


@pytest.fixture
def index() -> PrefixIndex:
    """Two engines of one host and one of another."""
    index = PrefixIndex(BLOCK_TOKENS)
    for endpoint, pool in (("a", "here"), ("b", "here"), ("c", "there")):
        index.pools.joined(endpoint, pool)
    return index


def loadable(index: PrefixIndex) -> list[int]:
    index.check()
    return index.match_tiers(PREFIX, ["a", "b", "c"])


@pytest.mark.parametrize("is_named_first", [True, False])
def test_both_have_to_speak(index: PrefixIndex, *, is_named_first: bool) -> None:
    """In either order; then every engine of the host can load the block, and none of another."""
    news: list[Callable[[], None]] = [
        lambda: index.apply("a", named()),
        lambda: index.pools.apply("here", kept(101, 102)),
    ]
    counts = []
    for tell in news if is_named_first else reversed(news):
        tell()
        counts.append(loadable(index))

    assert counts == [[0, 0, 0], [2, 2, 0]]
    assert index.match(PREFIX, ["a"]) == [0]
    assert index.num_in_tiers == 2


def test_names_go_on_where_they_ended(index: PrefixIndex) -> None:
    """A later part of a prompt follows the number before it; one that is not known has no place."""
    index.pools.apply("here", kept(*NUMBERS))
    index.apply("a", named(2, 4))
    orphans = index.num_orphans
    index.apply("a", named(0, 2))
    index.apply("a", named(2, 4))

    assert orphans == 1
    assert loadable(index) == [4, 4, 0]


def test_cache_and_pool_add_up(index: PrefixIndex) -> None:
    """What an engine holds itself lies before, between and behind what it can load."""
    tokens = TOKENS[: 2 * BLOCK_TOKENS]
    index.apply("a", BlockStored([1, 2], tokens, BLOCK_TOKENS, medium="GPU"))
    index.apply("a", named())
    index.pools.apply("here", kept(103))

    assert loadable(index) == [3, 0, 0]


def test_what_is_gone_does_not_count(index: PrefixIndex) -> None:
    """Evicted, cleared, or of a daemon that is not heard any more."""
    index.apply("a", named())
    index.pools.apply("here", kept(*NUMBERS))
    index.pools.apply("here", BlockRemoved([102, 999], medium=POOL_MEDIUM))
    after_eviction = loadable(index)
    index.pools.apply("here", kept(102))
    index.pools.apply("here", AllBlocksCleared())
    after_clear = loadable(index)
    index.pools.apply("here", kept(*NUMBERS))
    index.drop("a")
    after_engine = loadable(index)
    index.pools.drop("here")

    assert [after_eviction[0], after_clear[0], after_engine[1]] == [1, 0, 4]
    assert loadable(index) == [0, 0, 0]


def test_tables_are_bounded() -> None:
    """Names and numbers beyond the limit push out the oldest."""
    pools = PoolBlocks(100)
    pools.joined("a", "here")
    for number in range(1000):
        if number % 2:
            pools.name([number], [number + 5000])
        pools.apply("here", kept(number))
        pools.check()

    assert pools.num_blocks("here") <= 100
    assert pools.extend([999 + 5000], "a", 0, {}, 0) == 1
