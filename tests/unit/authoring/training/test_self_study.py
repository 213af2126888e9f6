"""Conversations that a model makes up about a document."""

import pytest

from kvkeep.authoring.prefill import prefilled_cache
from kvkeep.authoring.texts import document_ids
from kvkeep.authoring.training.forward import layers_of
from kvkeep.authoring.training.self_study import (
    BATCH,
    PASSAGE_CHARS_MAX,
    Conversation,
    Reader,
    is_held_out,
    make_up,
    passages_of,
)
from kvkeep.authoring.training.settings import TrainingSettings
from tests.unit.authoring.tiny import TEXT, tiny_author


@pytest.fixture(scope="module")
def reader() -> Reader:
    """A tiny Llama with the text before it."""
    author = tiny_author()
    ids = document_ids(author.tokenizer, TEXT, "none", 1000)
    settings = TrainingSettings(num_tokens=8, num_conversations=20, answer_tokens_max=6)
    return Reader(author, layers_of(prefilled_cache(author, ids)), settings)


@pytest.fixture(scope="module")
def made(reader: Reader) -> list[Conversation]:
    """What it makes up."""
    return all_of(reader, [])


def all_of(reader: Reader, made: list[Conversation]) -> list[Conversation]:
    """All conversations, those made before first."""
    return made + [each for batch in make_up(reader, TEXT, made) for each in batch]


def test_passages_cover_the_text() -> None:
    """Each sentence by itself, and with the next one where both are short."""
    assert passages_of("One is. Two are! Three?\n\nFour") == [
        *("One is.", "One is. Two are!", "Two are!", "Two are! Three?"),
        *("Three?", "Three? Four", "Four"),
    ]


def test_a_text_without_sentences_is_cut() -> None:
    """No passage is longer than an answer should be, and nothing is left out."""
    found = passages_of("x" * (2 * PASSAGE_CHARS_MAX + 5))

    assert [len(each) for each in found] == [PASSAGE_CHARS_MAX, PASSAGE_CHARS_MAX, 5]


def test_as_many_are_made_up_as_were_asked_for(made: list[Conversation]) -> None:
    """The last batch is as short as it has to be."""
    assert len(made) == 20


def test_what_was_made_before_is_gone_on_with(reader: Reader, made: list[Conversation]) -> None:
    """As if nobody had stopped: equal settings give equal ones."""
    assert all_of(reader, made[:BATCH]) == made


def test_three_of_four_answers_are_the_document_s_own_words(
    reader: Reader, made: list[Conversation]
) -> None:
    """The others are what the model says, at most as long as was asked for."""
    decode = reader.author.tokenizer.decode
    answers = [decode(each.answer_ids, skip_special_tokens=True) for each in made]

    assert all(answer in TEXT for idx, answer in enumerate(answers) if idx % 4 != 0)
    assert all(len(each.answer_ids) <= 7 for each in made[::4])


def test_every_question_is_a_chat(reader: Reader, made: list[Conversation]) -> None:
    """In the model's own form."""
    prompts = [reader.author.tokenizer.decode(each.prompt_ids) for each in made]

    assert all(each.startswith("[user]") and each.endswith("[answer]") for each in prompts)
    assert len(set(prompts)) > 12


def test_every_eighth_is_held_out() -> None:
    """So that some are, of the fewest there may be."""
    assert [idx for idx in range(24) if is_held_out(idx)] == [7, 15, 23]
