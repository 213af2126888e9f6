"""What an index believes of an engine whose events say less than they should."""

import pytest

from kvkeep.router.events.block_events import AllBlocksCleared, BlockRemoved, BlockStored
from kvkeep.router.prefix_hashes import token_hashes, token_root
from kvkeep.router.prefix_index import SILENT_PROMPTS, PrefixIndex

BLOCK_TOKENS = 4
NAME = "engine"


def prompt(number: int, num_blocks: int = 3) -> list[int]:
    tokens = [number * 1000 + idx for idx in range(num_blocks * BLOCK_TOKENS)]
    return token_hashes(tokens, BLOCK_TOKENS, token_root())


def held(index: PrefixIndex, prefix: list[int]) -> int:
    return index.match(prefix, [NAME])[0]


@pytest.fixture
def index() -> PrefixIndex:
    """An index that has heard the engine's events."""
    index = PrefixIndex(BLOCK_TOKENS)
    index.apply(NAME, AllBlocksCleared())
    return index


def answer(index: PrefixIndex, prefix: list[int], reported: int | None = None) -> None:
    expected = held(index, prefix)
    index.assume(NAME, prefix)
    index.correct(NAME, prefix, expected, reported)


def test_what_an_engine_with_events_does_not_tell_it_does_not_hold(index: PrefixIndex) -> None:
    """A prompt that left no event of its blocks was not stored."""
    answer(index, prompt(1))

    assert held(index, prompt(1)) == 0


def test_an_engine_that_falls_silent_is_believed_to_store(index: PrefixIndex) -> None:
    """Prompt after prompt without any event: the publisher hangs, and own choices count again."""
    for number in range(SILENT_PROMPTS + 2):
        answer(index, prompt(number))

    assert held(index, prompt(SILENT_PROMPTS - 2)) == 0
    assert held(index, prompt(SILENT_PROMPTS + 1)) == 3
    index.check()


def test_one_event_ends_the_silence(index: PrefixIndex) -> None:
    """What is told counts again from the first event on."""
    for number in range(SILENT_PROMPTS):
        answer(index, prompt(number))
    tokens = list(range(BLOCK_TOKENS))
    index.apply(NAME, BlockStored([7], tokens, BLOCK_TOKENS))
    answer(index, prompt(100))

    assert held(index, prompt(100)) == 0
    assert held(index, token_hashes(tokens, BLOCK_TOKENS, token_root())) == 1


def test_hits_are_no_silence(index: PrefixIndex) -> None:
    """An engine that holds all it is asked for has nothing to tell."""
    tokens = list(range(3 * BLOCK_TOKENS))
    known = token_hashes(tokens, BLOCK_TOKENS, token_root())
    index.apply(NAME, BlockStored([1, 2, 3], tokens, BLOCK_TOKENS))
    for _ in range(2 * SILENT_PROMPTS):
        answer(index, known, reported=3)
    answer(index, prompt(9))

    assert held(index, prompt(9)) == 0


def test_responses_tell_what_the_belief_is_worth(index: PrefixIndex) -> None:
    """Only those that say how much was held count; a block more or less is no error."""
    for reported in (None, 0, 1, 2, 3):
        answer(index, prompt(reported or 0), reported)

    assert (index.num_checked, index.num_off) == (4, 2)


def test_another_block_length_is_told(index: PrefixIndex) -> None:
    """What the router was told wrong about its engines can be seen."""
    index.apply(NAME, BlockStored([1], [1] * 8, 8))

    assert (index.num_refused, index.refused_block_tokens) == (1, 8)


def test_a_copy_counts_though_its_block_was_evicted_here_meanwhile() -> None:
    """An engine that stored a block twice has it until it removed both, whatever was forgotten."""
    index = PrefixIndex(BLOCK_TOKENS, blocks_max=4)
    tokens = list(range(BLOCK_TOKENS))
    prefix = token_hashes(tokens, BLOCK_TOKENS, token_root())
    stored, removed = BlockStored([7], tokens, BLOCK_TOKENS), BlockRemoved([7])
    index.apply(NAME, stored)
    index.assume("other", prompt(1, num_blocks=4))
    assert held(index, prefix) == 0
    index.apply(NAME, stored)
    index.apply(NAME, removed)
    assert held(index, prefix) == 1
    index.apply(NAME, removed)

    assert held(index, prefix) == 0
    index.check()
