"""From a document's text to the token ids that a request with this text begins with."""

import importlib
from pathlib import Path
from typing import Any, Literal

from kvkeep.model.errors import InputError

Role = Literal["none", "system", "user"]
"""Whose message of a chat the text begins; ``none``: a prompt without chat."""
TEXT_BYTES_MAX = 64 << 20
_SEAM = "\u2402seam\u2402"
"""Stands in a rendered chat where the text ends; a document that holds it is refused."""


def read_text(path: Path) -> str:
    """A document.

    Raises:
        InputError: It can't be read, is no UTF-8 text, is empty or too long.
    """
    try:
        with path.open("rb") as file:
            payload = file.read(TEXT_BYTES_MAX + 1)
        text = payload.decode()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): name a text file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text: convert it first") from error
    if len(payload) > TEXT_BYTES_MAX:
        raise InputError(f"{path} has more than {TEXT_BYTES_MAX} bytes: name a shorter text")
    if not text.strip():
        raise InputError(f"{path} is empty: name a file with text")
    return text


def document_ids(tokenizer: Any, text: str, role: Role, tokens_max: int) -> list[int]:
    """Token ids of a document as a prompt begins with it.

    Without a role these are the ids of a completion's prompt, with what the tokenizer puts before
    every text. With a role they are the chat's own beginning, up to the text's end: its
    first message goes on with whatever follows the document.

    Raises:
        InputError: The tokenizer has no chat template for this, or there are more ids than the
            model takes.
    """
    if role == "none":
        token_ids = [int(each) for each in tokenizer(text)["input_ids"]]
    else:
        token_ids = _plain_ids(tokenizer, _chat_beginning(tokenizer, text, role))
    if not token_ids:
        raise InputError("the text has no tokens: name a file with text")
    if len(token_ids) >= tokens_max:
        raise InputError(
            f"the text has {len(token_ids)} tokens and the model takes {tokens_max} with the "
            "question: shorten it"
        )
    return token_ids


def _chat_beginning(tokenizer: Any, text: str, role: Role) -> str:
    if _SEAM in text:
        raise InputError(f"the text holds {_SEAM!r}, which kvkeep needs itself: take it out")
    messages = [{"role": role, "content": text + _SEAM}]
    if role == "system":
        # Many templates take no chat without a question.
        messages.append({"role": "user", "content": "?"})
    rendered = _rendered(tokenizer, messages)
    before, seam, _ = rendered.partition(_SEAM)
    if not seam or not before.endswith(text):
        raise InputError(
            f"the model's chat template does not keep a {role}'s text as it is: build without "
            "--role, or trim spaces around the text"
        )
    return before


def question_ids(tokenizer: Any, question: str) -> list[int]:
    """Token ids of a chat of one question, up to where the answer begins.

    A model without a chat template gets the question as text.
    """
    if not getattr(tokenizer, "chat_template", None):
        return _plain_ids(tokenizer, f"\nQuestion: {question}\nAnswer:")
    messages = [{"role": "user", "content": question}]
    return _plain_ids(tokenizer, _rendered(tokenizer, messages))


def answer_ids(tokenizer: Any, answer: str) -> list[int]:
    """Token ids of an answer, its end included where the model says one."""
    if not getattr(tokenizer, "chat_template", None):
        answer = f" {answer}"
    ended = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return _plain_ids(tokenizer, answer) + ended


def _rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the model has no chat template: build without --role")
    # Comes with transformers, which this module does not import.
    broken: Any = importlib.import_module("jinja2").TemplateError
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    except (ValueError, TypeError, broken) as error:
        raise InputError(f"the model's chat template refuses the text ({error})") from error


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return [int(each) for each in tokenizer(text, add_special_tokens=False)["input_ids"]]
