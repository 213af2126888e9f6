"""Prompts and documents: distinct, reproducible, and from texts that are free to ship."""

import re
from pathlib import Path

import pytest

from kvkeep.model.errors import InputError
from kvkeep.validate.prompts import (
    TEXT_NAMES,
    control_prompts,
    documents,
    fetch_words,
    load_play,
    load_words,
    make_secrets,
    random_prompts,
    window_prompts,
)

FOREIGN_LINES = re.compile(
    r"gutenberg|e-?text\b|trademark|copyright|\blicen[cs]e (?:agreement|terms)|www\.|@\w+\.", re.I
)


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_a_shipped_play_is_the_play_alone(name: str) -> None:
    """The texts hold the play from its title to its end, and no digitizer's header or licence."""
    text = load_play(name)

    assert "by William Shakespeare" in text[:80]
    assert len(text.split()) > 15_000
    assert FOREIGN_LINES.findall(text) == []


def test_an_unknown_play_is_refused() -> None:
    """A text that does not ship is named in the refusal, with those that do."""
    with pytest.raises(InputError, match="hamlet"):
        load_play("faust")


def test_documents_are_distinct_from_their_beginning() -> None:
    """No two documents share a prefix beyond the word that numbers them, nor a code word."""
    made = documents(12, 500, seed=1)

    assert len({document.text[:12] for document in made}) == 12
    assert len({document.secret for document in made}) == 12
    assert all(made[i].secret in made[i].text[:90] for i in range(12))
    assert not any(made[0].secret in document.text for document in made[1:])


def test_documents_follow_from_the_seed() -> None:
    """The same seed cuts the same documents, another one others."""
    assert documents(3, 100, seed=7) == documents(3, 100, seed=7)
    assert documents(3, 100, seed=7) != documents(3, 100, seed=8)


def test_more_documents_than_the_text_holds_still_differ() -> None:
    """Past the end of the text passages overlap, and the documents are still all different."""
    words = [f"w{i}" for i in range(100)]

    made = documents(20, 20, words=words)

    assert len({document.text for document in made}) == 20
    assert all(len(document.text.split("\n\n")[1].split()) == 20 for document in made)


def test_a_document_longer_than_the_text_is_refused() -> None:
    """A length the text cannot give is refused with the lengths it can."""
    with pytest.raises(InputError, match="8 to 10 words"):
        documents(1, 11, words=["word"] * 10)


def test_code_words_differ_and_follow_from_the_seed() -> None:
    """Any number of code words can be had, all different."""
    made = make_secrets(500, 3)

    assert len(set(made)) == 500
    assert made == make_secrets(500, 3)


def test_windows_slide_over_the_text() -> None:
    """Window i holds words i * n and following, and every window its own code word."""
    words = [f"w{i}" for i in range(50)]

    made = window_prompts(words, 3, 10, seed=42)

    assert "w0 w1" in made[0].text
    assert "w10 w11" in made[1].text
    assert "w29" in made[2].text
    assert len({prompt.secrets for prompt in made}) == 3


def test_windows_past_the_end_start_over_one_word_on() -> None:
    """A short text is used again, shifted, so that no window is repeated."""
    words = [f"w{i}" for i in range(20)]

    made = window_prompts(words, 6, 10, seed=42)

    passages = {prompt.text.split("\n\n")[1] for prompt in made}
    assert len(passages) == 6
    assert "w1 w2" in made[2].text


def test_there_are_six_control_and_five_random_prompts() -> None:
    """The suite's fixed prompts are those numbers, all different."""
    fixed = [*control_prompts(), *random_prompts()]

    assert (len(control_prompts()), len(random_prompts())) == (6, 5)
    assert len({prompt.text for prompt in fixed}) == 11


def test_a_text_can_come_from_a_file(tmp_path: Path) -> None:
    """A file address works offline; a text without words is refused."""
    path = tmp_path / "text.txt"
    path.write_text("one two three four five six seven eight nine")

    assert fetch_words(path.as_uri())[:2] == ("one", "two")
    path.write_text("short")
    with pytest.raises(InputError, match="no use"):
        fetch_words(path.as_uri())


def test_a_text_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A text that cannot be read is refused, with the shipped plays as the way out."""
    with pytest.raises(InputError, match="shipped plays"):
        fetch_words((tmp_path / "none.txt").as_uri())


def test_all_shipped_words_are_there() -> None:
    """The shipped plays hold enough words for dozens of long documents."""
    assert len(load_words()) > 120_000
