"""Sixty requests that a pair answers, and what one engine answers to the same prompts."""

import asyncio
import contextlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx

from kvkeep.validate.answer import Answer
from kvkeep.validate.prompts import load_words
from kvkeep.validate.verdict import PASSING, judge
from tests.e2e.pairs import (
    BLOCK_TOKENS,
    MIN_TOKENS,
    Pair,
    Question,
    ask,
    client_of,
    read_metrics,
    since,
)

NUM_WORDS = (2150, 260, 200, 160, 130, 110, 90, 80, 60, 40, 36, 25, 18, 6, 1)
"""Of the prompts: from some five to three thousand tokens, with and without a rest of a block."""
CHAT_WORDS_MAX = 300
IN_FLIGHT = 3
"""Requests under way at an address."""


@dataclass(frozen=True)
class Asked:
    """One request of the sixty."""

    question: Question
    is_streamed: bool


@dataclass(frozen=True)
class Sixty:
    """What came of them."""

    asked: Sequence[Asked]
    single: Sequence[Answer]
    """Of an engine by itself, to the question of each."""
    answers: Sequence[Answer]
    """Of the pair, through its router."""
    counted: Mapping[str, float]
    """What the decode engine counted while the pair answered."""

    @property
    def differing(self) -> list[tuple[str, str]]:
        """Answers that are neither identical nor near-ties: of which question, and why not."""
        judged = [
            (asked.question.name, judge(wanted, answer))
            for asked, wanted, answer in zip(self.asked, self.single, self.answers, strict=True)
        ]
        return [(name, each.reason) for name, each in judged if each.verdict not in PASSING]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt, as the pair reports them."""
        return [answer.prompt_tokens or 0 for answer in self.answers]

    @property
    def handed(self) -> list[int]:
        """Of the prompts that were surely handed over: the router reckons lengths by bytes."""
        return [length for length in self.lengths if length > 2 * MIN_TOKENS]

    @property
    def num_loaded(self) -> int:
        """Prompt tokens that the decode engine got from the other one."""
        return int(self.counted["vllm:external_prefix_cache_hits_total"])

    @property
    def num_computed_max(self) -> int:
        """Tokens of prompts handed over that the decode engine computed at most, by counters."""
        return sum(self.handed) - self.num_loaded

    @property
    def is_less_than_a_block_each(self) -> bool:
        """Whether it computed no more of each than the rest of a block, or the last block."""
        return self.num_computed_max <= BLOCK_TOKENS * len(self.handed)


def questions() -> list[Question]:
    """Every prompt as a chat and as a completion, no two with a beginning in common."""
    words = load_words()
    made = []
    start = 0
    for words_max in NUM_WORDS:
        for is_chat in (False, True):
            num_words = min(words_max, CHAT_WORDS_MAX) if is_chat else words_max
            text = " ".join(words[start : start + num_words])
            kind = "chat" if is_chat else "completion"
            made.append(Question(f"{kind} of {num_words} words", text, is_chat))
            start += num_words
    return made


def ask_sixty(pair: Pair) -> Sixty:
    """Ask each question of an engine by itself, and twice of the pair: streamed, and not."""
    plain = [Asked(question, is_streamed=False) for question in questions()]
    # Neither knows the other here, and what both compute takes half as long.
    single = asyncio.run(_ask_all((pair.prefill.url, pair.decode.url), plain))
    asked = [Asked(item.question, is_streamed) for item in plain for is_streamed in (True, False)]
    before = read_metrics(pair.decode.url)
    with pair.routed({}) as router:
        answers = asyncio.run(_ask_all((router.url,), asked))
    counted = since(before, read_metrics(pair.decode.url))
    return Sixty(asked, [answer for answer in single for _ in range(2)], answers, counted)


async def _ask_all(urls: Sequence[str], asked: Sequence[Asked]) -> list[Answer]:
    """Some at a time, of whoever is free, each under a salt of its own: none finds another's KV."""
    answers: dict[int, Answer] = {}
    upcoming = iter(enumerate(asked))

    async def ask_on(client: httpx.AsyncClient) -> None:
        for idx, item in upcoming:
            salt = secrets.token_hex(8)
            answers[idx] = await ask(client, item.question, salt=salt, is_streamed=item.is_streamed)

    async with contextlib.AsyncExitStack() as opened, asyncio.TaskGroup() as group:
        for url in urls:
            client = await opened.enter_async_context(client_of(url))
            for _ in range(IN_FLIGHT):
                group.create_task(ask_on(client))
    return [answers[idx] for idx in range(len(asked))]
