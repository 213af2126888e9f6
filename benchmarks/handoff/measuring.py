"""Long prompts asked of a pair, and of its decode engine by itself: first tokens, pauses."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx

from benchmarks.quiet import BUSY_SHARE_MAX, foreign_share, read_cpu
from kvkeep.model.errors import UnavailableError
from kvkeep.validate.answer import Answer
from kvkeep.validate.prompts import load_words
from kvkeep.validate.verdict import PASSING, judge
from tests.e2e.pairs import Pair, Question, ask, client_of, read_metrics

PROMPT_WORDS = 2150
"""Three thousand tokens and some."""
WORDS_FROM = 40_000
"""Those before are in the sixty."""
ANSWER_TOKENS = 8
WARMING_PROMPTS = 1
"""The first hand-off opens connections and touches memory for the first time."""
STREAM_WORDS, STREAM_TOKENS = 20, 256
NUM_INTRUDERS = 2


@dataclass
class Measured:
    """What one transport showed; times in seconds."""

    handed_s: list[float] = field(default_factory=list)
    """To the first token, through the router."""
    single_s: list[float] = field(default_factory=list)
    """To the first token, of the decode engine by itself."""
    prompt_tokens: list[int] = field(default_factory=list)
    computed_tokens: list[float] = field(default_factory=list)
    """By the decode engine, of prompts that were handed over."""
    bytes_moved: list[float] = field(default_factory=list)
    """By the transport's own count."""
    differing: list[str] = field(default_factory=list)
    """Why long answers are neither identical nor near-ties."""
    gap_handed_s: float = 0.0
    """Longest pause of a stream while other prompts arrive at the router."""
    gap_single_s: float = 0.0
    """The same while they arrive at the engine that writes the stream."""
    is_quiet: bool = True


def measure_times(pair: Pair, num_prompts: int) -> Measured:
    """Ask long prompts both ways in turns, then some beside a stream.

    Raises:
        UnavailableError: An engine or the router did not answer.
    """
    found = Measured()
    before = read_cpu()
    with pair.routed({}) as router:
        asyncio.run(_ask_in_turns(pair, router.url, found, num_prompts))
    found.is_quiet = foreign_share(before, read_cpu()) <= BUSY_SHARE_MAX
    return found


async def _ask_in_turns(pair: Pair, router_url: str, found: Measured, num_prompts: int) -> None:
    prompts = _cut_prompts(num_prompts + WARMING_PROMPTS + 2 * NUM_INTRUDERS)
    for idx in range(num_prompts + WARMING_PROMPTS):
        kept = found if idx >= WARMING_PROMPTS else Measured()
        await _ask_both_ways(pair, router_url, prompts.pop(), kept)
    others = prompts[:NUM_INTRUDERS], prompts[NUM_INTRUDERS:]
    found.gap_handed_s = await _longest_gap_s(pair.decode.url, router_url, others[0])
    found.gap_single_s = await _longest_gap_s(pair.decode.url, pair.decode.url, others[1])


def _cut_prompts(count: int) -> list[str]:
    words = load_words()[WORDS_FROM:]
    starts = range(0, count * PROMPT_WORDS, PROMPT_WORDS)
    return [" ".join(words[start : start + PROMPT_WORDS]) for start in starts]


async def _ask_both_ways(pair: Pair, router_url: str, text: str, found: Measured) -> None:
    moved, hits = _bytes_moved(pair), _hits(pair)
    handed = await _ask(router_url, text)
    computed = (handed.prompt_tokens or 0) - (_hits(pair) - hits)
    moved = _bytes_moved(pair) - moved
    single = await _ask(pair.decode.url, text)
    assert handed.ttft_s is not None
    assert single.ttft_s is not None
    found.handed_s.append(handed.ttft_s)
    found.single_s.append(single.ttft_s)
    found.prompt_tokens.append(handed.prompt_tokens or 0)
    found.computed_tokens.append(computed)
    found.bytes_moved.append(moved)
    judged = judge(single, handed)
    found.differing += [] if judged.verdict in PASSING else [judged.reason]


async def _ask(url: str, text: str, max_tokens: int = ANSWER_TOKENS) -> Answer:
    """One streamed completion under a salt of its own: nobody has its blocks.

    Raises:
        UnavailableError: It was not answered.
    """
    question = Question("a long prompt", text, is_chat=False, max_tokens=max_tokens)
    async with client_of(url) as client:
        answer = await ask(client, question, salt=secrets.token_hex(8), is_streamed=True)
    if answer.error is not None or answer.ttft_s is None:
        raise UnavailableError(f"no answer from {url}: {answer.error or 'no token came'}")
    return answer


def _hits(pair: Pair) -> float:
    told = read_metrics(pair.decode.url)
    return told["vllm:prefix_cache_hits_total"] + told["vllm:external_prefix_cache_hits_total"]


def _bytes_moved(pair: Pair) -> float:
    if pair.transport == "pool":
        return read_metrics(pair.stack.daemon.metrics_url)["kvkeep_bytes_loaded_total"]
    return read_metrics(pair.decode.url).get("vllm:nixl_bytes_transferred_sum", 0.0)


async def _longest_gap_s(url: str, asked_url: str, prompts: Sequence[str]) -> float:
    """Longest pause of a stream of the engine at ``url`` while prompts are asked one by one."""
    arrivals: list[float] = []
    has_begun = asyncio.Event()

    async def read_stream() -> None:
        text = " ".join(load_words()[:STREAM_WORDS])
        question = Question("a stream", text, is_chat=False, max_tokens=STREAM_TOKENS)
        body = question.body(salt=secrets.token_hex(8), is_streamed=True) | {"ignore_eos": True}
        async with (
            client_of(url) as client,
            client.stream("POST", question.path, json=body) as response,
        ):
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    arrivals.append(time.perf_counter())
                    has_begun.set()

    async def intrude() -> None:
        await has_begun.wait()
        for prompt in prompts:
            await _ask(asked_url, prompt, max_tokens=1)

    try:
        await asyncio.gather(read_stream(), intrude())
    except httpx.HTTPError as error:
        raise UnavailableError(f"the stream of {url} broke off: {error}") from error
    return max(later - earlier for earlier, later in itertools.pairwise(arrivals))
