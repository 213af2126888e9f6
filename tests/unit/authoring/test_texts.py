"""Token ids of documents, questions and answers."""

from pathlib import Path

import pytest

from kvkeep.authoring.texts import answer_ids, document_ids, question_ids, read_text
from kvkeep.model.errors import InputError
from tests.unit.authoring.tiny import tiny_tokenizer


def test_a_plain_text_is_a_prompt_without_chat() -> None:
    """The tokenizer's own ids."""
    tokenizer = tiny_tokenizer()

    assert document_ids(tokenizer, "ab c", "none", 100) == tokenizer("ab c")["input_ids"]


@pytest.mark.parametrize("role", ["system", "user"])
def test_a_chat_that_begins_with_the_text_begins_with_its_ids(role: str) -> None:
    """Whatever its first message goes on with."""
    tokenizer = tiny_tokenizer()
    ids = document_ids(tokenizer, "a text.", role, 100)  # type: ignore[arg-type]
    chat = [{"role": role, "content": "a text. And more"}, {"role": "user", "content": "why"}]
    whole = tokenizer.apply_chat_template(chat, tokenize=False)

    assert tokenizer.decode(ids) == f"[{role}]a text."
    assert tokenizer(whole, add_special_tokens=False)["input_ids"][: len(ids)] == ids


@pytest.mark.parametrize(
    ("template", "text", "sentence"),
    [
        (None, "a", "has no chat template: build without --role"),
        ("{{ messages[0]['content'] | trim | upper }}", "a", "does not keep a user's text"),
        ("{{ messages[0]['content'] | replace('x', 'y') }}", "x", "does not keep a user's text"),
        ("{{ raise_exception('no') }}", "a", "refuses the text"),
        ("{{ messages[0]['content'] }}", "a\u2402seam\u2402", "which kvkeep needs itself"),
    ],
)
def test_a_template_that_changes_the_text_is_refused(
    template: str | None, text: str, sentence: str
) -> None:
    """It would never match what engines see."""
    with pytest.raises(InputError, match=sentence):
        document_ids(tiny_tokenizer(template), text, "user", 100)


def test_a_text_has_to_leave_room_for_a_question() -> None:
    """One that fills the model is refused, with both numbers."""
    with pytest.raises(InputError, match="the text has 4 tokens and the model takes 4"):
        document_ids(tiny_tokenizer(), "abcd", "none", 4)
    assert len(document_ids(tiny_tokenizer(), "abc", "none", 4)) == 3


def test_questions_are_asked_as_the_model_is_used_to() -> None:
    """In a chat where it has a template, else as text; answers end where it says an end."""
    chatting, plain = tiny_tokenizer(), tiny_tokenizer(None)

    assert chatting.decode(question_ids(chatting, "why?")) == "[user]why?[answer]"
    assert plain.decode(question_ids(plain, "why?")) == "\nQuestion: why?\nAnswer:"
    assert answer_ids(chatting, "so")[-1] == chatting.eos_token_id
    assert plain.decode(answer_ids(plain, "so")[:-1]) == " so"


def test_a_file_is_read(tmp_path: Path) -> None:
    """As UTF-8."""
    (tmp_path / "a.txt").write_text("grün\n")

    assert read_text(tmp_path / "a.txt") == "grün\n"


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [(b"\xff\xfe", "is no UTF-8 text"), (b" \n", "is empty"), (None, "can't be read")],
)
def test_what_is_no_text_is_refused(tmp_path: Path, payload: bytes | None, sentence: str) -> None:
    """In a sentence that names the file."""
    path = tmp_path / "a.txt"
    if payload is not None:
        path.write_bytes(payload)

    with pytest.raises(InputError, match=f"a.txt {sentence}"):
        read_text(path)
