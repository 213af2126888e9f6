"""Prompts and documents of the suites: cut from shipped plays, the same for the same seed.

Long prompts carry a code word near their beginning, so that a block of another prompt's KV shows
in the answer: a foreign code word there is contamination.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from random import Random
from urllib.parse import quote, unquote, urlsplit

import httpx

from kvkeep.model.errors import InputError
from kvkeep.validate.answer import Prompt

TEXT_NAMES = ("hamlet", "macbeth", "othello", "romeo_and_juliet", "king_lear")
WORDS_MIN = 8
TEXT_BYTES_MAX = 64 << 20
"""A text from an address is read into memory; the complete works have 5.5 MB."""

CONTROL_PROMPTS = (
    "Name the planets of the solar system in order from the sun, one per line.",
    "Explain in two sentences why the sky is blue during the day and red at sunset.",
    "Write a short poem of four lines about a lighthouse in a storm.",
    "A train leaves at nine and travels three hours at sixty miles an hour. How far does it get?",
    "List five things a careful person packs for a week in the mountains.",
    "Translate into French: The library opens at eight and closes at six.",
)
"""Asked all six every control interval; short, so mostly below or near one block."""

RANDOM_PROMPTS = (
    "Describe a city that was built entirely under water, and how its people get their news.",
    "What would a chess grandmaster say about the opening moves of a thunderstorm?",
    "Invent a recipe that uses only ingredients starting with the letter P.",
    "Give three reasons why a cat might refuse to become president of a small republic.",
    "Write the first lines of a letter from the last speaker of a forgotten language.",
)
"""The five "random" prompts: unlike each other, and fixed like everything else here."""

_COLORS = ("amber", "violet", "copper", "silver", "scarlet", "indigo", "cobalt", "golden")
_CREATURES = ("falcon", "badger", "otter", "heron", "lynx", "marten", "salmon", "raven")
_OPENING = "Passage {number}. The code word of this passage is {secret}."
_QUESTION = "State the code word of this passage, then tell in one sentence what happens in it."


@dataclass(frozen=True, slots=True)
class Document:
    """One long text with a code word of its own."""

    name: str
    text: str
    """The code word's sentence first, then the passage."""
    secret: str
    question: str = "What is the code word of this passage? Answer with the code word only."

    def prompt(self, question: str | None = None) -> Prompt:
        """The document followed by a question about it."""
        text = f"{self.text}\n\n{question or self.question}"
        return Prompt(self.name, text, "document", (self.secret,))


@cache
def load_play(name: str) -> str:
    """Text of a shipped play.

    Raises:
        InputError: No such play ships.
    """
    if name not in TEXT_NAMES:
        raise InputError(f"No text {name!r} ships: take one of {', '.join(TEXT_NAMES)}.")
    return files("kvkeep.validate").joinpath(f"texts/{name}.txt").read_text("utf-8")


@cache
def load_words() -> tuple[str, ...]:
    """Words of all shipped plays, in a fixed order; about 130,000."""
    return tuple(word for name in TEXT_NAMES for word in load_play(name).split())


def fetch_words(url: str, *, timeout_s: float = 30.0) -> tuple[str, ...]:
    """Words of a text behind an ``http``, ``https`` or ``file`` address.

    Raises:
        InputError: It can't be read, is too large, or holds hardly any words.
    """
    data = _fetch(url, timeout_s, "none to use the shipped plays")
    words = tuple(data.decode("utf-8", "replace").split())
    if len(data) > TEXT_BYTES_MAX or len(words) < WORDS_MIN:
        raise InputError(f"The text at {url} is no use: {len(data)} bytes, {len(words)} words.")
    return words


@cache
def fetch_rows(place: str, *fields: str, timeout_s: float = 30.0) -> tuple[tuple[str, ...], ...]:
    """Rows of a data set in JSON Lines, in a file or behind an address.

    Args:
        place: Path, or ``http``, ``https`` or ``file`` address.
        fields: What is taken of each row, as text.
        timeout_s: Longest wait for a server.

    Returns:
        The fields of each row, in the order of the file.

    Raises:
        InputError: It can't be read, is too large, or a row lacks a field.
    """
    address = (
        place if "://" in place else f"file://{quote(str(Path(place).expanduser().absolute()))}"
    )
    data = _fetch(address, timeout_s, "none to use prompts made here")
    try:
        lines = [line for line in data.decode("utf-8").splitlines() if line.strip()]
        rows = tuple(tuple(str(json.loads(line)[field]) for field in fields) for line in lines)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{place} is no such data set: each line has to be JSON with {' and '.join(fields)}."
        ) from error
    if len(data) > TEXT_BYTES_MAX or not rows:
        raise InputError(f"The data set {place} is no use: {len(data)} bytes, {len(rows)} rows.")
    return rows


def _fetch(url: str, timeout_s: float, otherwise: str) -> bytes:
    """What lies behind an address, hardly more than `TEXT_BYTES_MAX` of a file."""
    parts = urlsplit(url)
    try:
        if parts.scheme == "file":
            with open(unquote(parts.path), "rb") as file:
                return file.read(TEXT_BYTES_MAX + 1)
        response = httpx.get(url, timeout=timeout_s, follow_redirects=True)
        response.raise_for_status()
    except (OSError, httpx.HTTPError, httpx.InvalidURL) as error:
        raise InputError(
            f"The text at {url} can't be read ({type(error).__name__}): give another address, or "
            f"{otherwise}."
        ) from error
    return response.content


def make_secrets(count: int, seed: int) -> list[str]:
    """Code words that differ from each other and that no model says by chance."""
    rng, made = Random(seed), dict[str, None]()
    while len(made) < count:
        number = rng.randrange(1000, 10_000)
        made[f"{rng.choice(_COLORS)}-{rng.choice(_CREATURES)}-{number}"] = None
    return list(made)


def documents(
    num: int, num_words: int, seed: int = 42, *, words: Sequence[str] | None = None
) -> list[Document]:
    """Cut distinct long documents.

    They share no prefix: each begins with its own number and code word. As long as the text
    suffices their passages do not overlap either.

    Args:
        num: How many.
        num_words: Words of each passage; this text has about 1.6 tokens a word.
        seed: Decides the code words and the order of passages.
        words: The text to cut from; None takes the shipped plays.

    Raises:
        InputError: A document would be longer than the text.
    """
    source = load_words() if words is None else words
    if not WORDS_MIN <= num_words <= len(source):
        raise InputError(f"Give documents of {WORDS_MIN} to {len(source)} words, not {num_words}.")
    starts = list(range(0, len(source) - num_words + 1, num_words))
    Random(seed).shuffle(starts)
    made = []
    for i, secret in enumerate(make_secrets(num, seed)):
        # Past the end of the list passages overlap; numbers and code words still tell them apart.
        start = (starts[i % len(starts)] + i // len(starts) * 7) % (len(source) - num_words + 1)
        passage = " ".join(source[start : start + num_words])
        opening = _OPENING.format(number=i + 1, secret=secret)
        made.append(Document(f"document-{i + 1}", f"{opening}\n\n{passage}", secret))
    return made


def control_prompts() -> list[Prompt]:
    """The six control prompts."""
    return [Prompt(f"control-{i + 1}", text, "control") for i, text in enumerate(CONTROL_PROMPTS)]


def random_prompts() -> list[Prompt]:
    """The five "random" prompts."""
    return [Prompt(f"random-{i + 1}", text, "random") for i, text in enumerate(RANDOM_PROMPTS)]


def window_prompts(words: Sequence[str], num: int, num_words: int, seed: int) -> list[Prompt]:
    """Slide a window over a text: window ``i`` holds words ``i * num_words`` and following.

    At the end of the text it starts over, one word further on, so that no two are equal.
    """
    secrets, made = make_secrets(num, seed), []
    for i, secret in enumerate(secrets):
        offset = i * num_words
        start = (offset + offset // len(words)) % len(words)
        passage = " ".join((*words[start:], *words[:start])[:num_words])
        opening = _OPENING.format(number=i + 1, secret=secret)
        text = f"{opening}\n\n{passage}\n\n{_QUESTION}"
        made.append(Prompt(f"window-{i + 1}", text, "window", (secret,)))
    return made
