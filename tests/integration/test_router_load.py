"""Load below what the engines can do: every request completes, and what is counted adds up."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import httpx
import pytest

from tests.integration.routers import Announced, engines, router, workers
from tests.waiting import HANG_S

PATIENCE_S = 120.0
BURSTS = (15, 2, 20, 3)
PROMPT_WORDS, ANSWER_TOKENS = (3, 40, 900, 150), (1, 64, 8)
STEADY_PER_S, STEADY_S = 2, 30
NUM_KEYS = 60


@dataclass(frozen=True)
class Got:
    """One whole answer."""

    usage: dict[str, Any]
    num_bytes: int


async def complete(session: aiohttp.ClientSession, url: str, number: int) -> Got:
    """Have a completion streamed whose lengths depend on its number; it must be whole."""
    words, tokens = (sizes[number % len(sizes)] for sizes in (PROMPT_WORDS, ANSWER_TOKENS))
    body = {
        "model": "fake-model",
        "prompt": f"question {number} " + "word " * words,
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        text = (await answer.read()).decode()
    assert answer.status == 200, text
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert not any("error" in chunk for chunk in chunks)
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == tokens == len(chunks) - 1
    return Got(chunks[-1]["usage"], len(text))


def check_totals(process: Announced, got: Sequence[Got]) -> None:
    """What the router counted is what the clients got, in all and over the engines."""
    told = workers(process)
    expected = {
        "requests_done": len(got),
        "requests_failed": 0,
        "requests_left": 0,
        "requests_untold": 0,
        "prompt_tokens": sum(each.usage["prompt_tokens"] for each in got),
        "completion_tokens": sum(each.usage["completion_tokens"] for each in got),
    }
    assert {name: told["total"][name] for name in expected} == expected
    for name, value in expected.items():
        assert sum(worker[name] for worker in told["workers"]) == value
    assert not any(told["refused"].values())
    assert told["gauges"]["requests_running"] == told["gauges"]["requests_waiting"] == 0


@contextlib.asynccontextmanager
async def opened_session() -> Any:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield session


def test_bursts_of_mixed_lengths_complete() -> None:
    """15, 2, 20 and 3 at once, one burst after another; the numbers move with each."""

    async def run(process: Announced) -> list[Got]:
        numbers, got = itertools.count(), list[Got]()
        async with opened_session() as session:
            for size in BURSTS:
                url = process.ready["url"]
                asked = [complete(session, url, next(numbers)) for _ in range(size)]
                got += await asyncio.gather(*asked)
                await asyncio.to_thread(check_totals, process, got)
        return got

    with engines(3) as urls, router(urls, {"policy": "least_loaded"}) as process:
        got = asyncio.run(run(process))
        listed = workers(process)["workers"]

    assert len(got) == sum(BURSTS)
    assert all(worker["requests_done"] > 0 for worker in listed)


@pytest.mark.nightly
@pytest.mark.timeout(120)
def test_a_steady_load_completes() -> None:
    """Two requests a second for half a minute."""

    async def run(process: Announced) -> list[Got]:
        async with opened_session() as session:
            asked = []
            for number in range(STEADY_PER_S * STEADY_S):
                asked.append(asyncio.create_task(complete(session, process.ready["url"], number)))
                await asyncio.sleep(1 / STEADY_PER_S)
            return list(await asyncio.gather(*asked))

    with engines(2) as urls, router(urls) as process:
        got = asyncio.run(run(process))
        check_totals(process, got)

    assert len(got) == STEADY_PER_S * STEADY_S


def homes(process: Announced) -> dict[str, str]:
    """The engine that each of many keys is sent to."""
    found = {}
    with httpx.Client(base_url=process.ready["url"], trust_env=False, timeout=HANG_S) as client:
        for number in range(NUM_KEYS):
            answer = client.post(
                "/v1/completions",
                json={"model": "fake-model", "prompt": f"new {number}", "max_tokens": 1},
                headers={"X-Session-Id": f"session {number}"},
            )
            assert answer.status_code == 200
            name, policy, _ = answer.headers["X-Kvkeep-Route"].split("; ", 2)
            assert policy == "consistent_hash"
            found[f"session {number}"] = name
    return found


def test_a_key_has_one_home_whichever_router_is_asked() -> None:
    """Two routers agree, told of the engines in another order, before a restart and after it."""
    settings = {"policy": "consistent_hash"}
    with engines(4) as urls:
        with router(urls, settings) as one, router(urls[::-1], settings) as other:
            before = homes(one)
            assert homes(other) == before
        with router(urls[1:] + urls[:1], settings) as restarted:
            assert homes(restarted) == before

    assert set(before.values()) == {url.removeprefix("http://") for url in urls}
