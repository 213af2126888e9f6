"""Which router makes engines compute less of the same prompts: ours, or vllm-router's cache_aware?

Four fake engines with prefix caches of their own serve HTTP in this process. Each router relays the
same users' conversations and questions about documents, closed loop, to engines that begin empty;
then the next router does, in turns. The figure is the share of prompt tokens that the engines'
own counters say they computed.
"""

import argparse
import asyncio
import dataclasses
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import aiohttp

from benchmarks.figures import Target, emit, median_figure
from benchmarks.peers.engines import HOST, free_port, listens, process, wait_until
from benchmarks.peers.environments import python_of
from kvkeep.testing.fake_engine import FakeEngine, Timing, serve

OK = 0
NUM_ENGINES = 4
MODEL = "fake-model"
TIMING = Timing(prefill_s_per_token=5e-5, decode_s_per_token=2e-3)
NUM_BLOCKS = 800
"""Of 16 words, on each engine: a third of what all users talk about."""
ROUND_ROBIN, CACHE_AWARE, OURS = "round_robin", "vllm-router.cache_aware", "kvkeep.prefix_aware"
NO_WORSE = 1.0
COMPUTED_MAX = 0.6


@dataclasses.dataclass(frozen=True)
class Load:
    """Who asks what."""

    num_talkers: int = 16
    num_readers: int = 8
    num_documents: int = 24
    asks_each: int = 14
    turns_max: int = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0 whether or not targets are met."""
    parser = argparse.ArgumentParser(prog="benchmarks.reuse", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", default=3, type=int, help="of all routers in turns")
    options = parser.parse_args(argv)
    shares: dict[str, list[float]] = {}
    unfair: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="kvkeep-reuse-") as folder:
        for seed in range(options.rounds):
            for name, command in commands().items():
                log = Path(folder) / f"{name}.log"
                engines = asyncio.run(measure(command, log, Random(seed)))
                asked = sum(each.counters["prefix_cache_queries"] for each in engines)
                work = [_computed(each) for each in engines]
                shares.setdefault(name, []).append(sum(work) / asked)
                unfair.setdefault(name, []).append(max(work) * NUM_ENGINES / sum(work))
    for name, values in shares.items():
        emit(
            median_figure(
                f"reuse.{name}.computed",
                values,
                "of all prompt tokens",
                peer_values=shares[CACHE_AWARE],
                peer_name=CACHE_AWARE,
                target=Target("ratio", "<=", NO_WORSE) if name == OURS else None,
            )
        )
        emit(median_figure(f"reuse.{name}.work_max_over_mean", unfair[name], "x"))
    emit(
        median_figure(
            f"reuse.{OURS}.computed_beside_round_robin",
            shares[OURS],
            "of all prompt tokens",
            peer_values=shares[ROUND_ROBIN],
            peer_name=ROUND_ROBIN,
            target=Target("ratio", "<=", COMPUTED_MAX),
        )
    )
    return OK


def _computed(engine: FakeEngine) -> int:
    """Return the prompt tokens that an engine computed."""
    return engine.counters["prefix_cache_queries"] - engine.counters["prefix_cache_hits"]


# --- Routers -------------------------------------------------------------------------------------

Command = Callable[[int, Sequence[str]], list[str]]
"""From a port and the engines' addresses to a command line."""


def commands() -> dict[str, Command]:
    """Return the routers, in the order in which they take turns."""
    own = [sys.executable, "-m", "kvkeep", "route"]
    peer = str(python_of("vllm-router").parent / "vllm-router")

    def ours(policy: str) -> Command:
        return lambda port, urls: [*own, *urls, "--port", str(port), "--policy", policy]

    def theirs(port: int, urls: Sequence[str]) -> list[str]:
        metrics = ["--prometheus-host", HOST, "--prometheus-port", str(free_port())]
        start = ["--worker-startup-check-interval", "1"]
        place = ["--host", HOST, "--port", str(port), "--policy", "cache_aware"]
        return [peer, *place, *metrics, *start, "--worker-urls", *urls]

    return {ROUND_ROBIN: ours("round_robin"), CACHE_AWARE: theirs, OURS: ours("prefix_aware")}


async def measure(command: Command, log: Path, chance: Random) -> list[FakeEngine]:
    """Serve the load through a router; return the engines, with what they counted."""
    engines = [
        FakeEngine(model=MODEL, timing=TIMING, num_blocks=NUM_BLOCKS) for _ in range(NUM_ENGINES)
    ]
    async with AsyncExitStack() as stack:
        urls = []
        for engine in engines:
            runner, url = await serve(engine)
            stack.push_async_callback(runner.cleanup)
            urls.append(url)
        url = await stack.enter_async_context(_running(command, urls, log))
        session = await stack.enter_async_context(aiohttp.ClientSession(url))
        await _until_answered(session)
        for engine in engines:
            engine.cache.clear()
            engine.counters.update(dict.fromkeys(engine.counters, 0))
        await _serve_load(session, Load(), chance)
    return engines


@asynccontextmanager
async def _running(command: Command, urls: Sequence[str], log: Path) -> AsyncIterator[str]:
    port = free_port()

    with process(command(port, urls), {}, log) as child:
        # The engines answer the router's questions from this loop while it starts.
        await asyncio.to_thread(wait_until, lambda: listens(port), child, command(port, urls)[0])
        yield f"http://{HOST}:{port}"


async def _until_answered(session: aiohttp.ClientSession) -> None:
    """A router that listens may not know its engines yet."""
    for _ in range(100):
        async with session.post("/v1/chat/completions", json=_body(["warm up"], 1)) as response:
            if response.status == 200:
                return
        await asyncio.sleep(0.2)
    raise RuntimeError("the router answered no request in 20 s")


# --- Users ---------------------------------------------------------------------------------------


async def _serve_load(session: aiohttp.ClientSession, load: Load, chance: Random) -> None:
    systems = [_words(chance, 200) for _ in range(2)]
    documents = [_words(chance, chance.randint(500, 1500)) for _ in range(load.num_documents)]
    weights = [1 / (rank + 1) for rank in range(load.num_documents)]
    users = [
        _talk(session, load, Random(chance.random()), chance.choice(systems))
        for _ in range(load.num_talkers)
    ]
    for _ in range(load.num_readers):
        asked = chance.choices(documents, weights, k=load.asks_each)
        users.append(_read(session, Random(chance.random()), asked))
    await asyncio.gather(*users)


async def _talk(session: aiohttp.ClientSession, load: Load, chance: Random, system: str) -> None:
    said: list[str] = []
    for _ in range(load.asks_each):
        if len(said) >= 2 * chance.randint(2, load.turns_max):
            said = []
        said = said or [system]
        said.append(_words(chance, chance.randint(20, 120)))
        said.append(await _ask(session, said, chance.randint(10, 60)))
        await asyncio.sleep(chance.expovariate(5.0))


async def _read(session: aiohttp.ClientSession, chance: Random, asked: Sequence[str]) -> None:
    for document in asked:
        await _ask(session, [f"{document} {_words(chance, 20)}"], 10)
        await asyncio.sleep(chance.expovariate(5.0))


async def _ask(session: aiohttp.ClientSession, said: Sequence[str], max_tokens: int) -> str:
    async with session.post("/v1/chat/completions", json=_body(said, max_tokens)) as response:
        response.raise_for_status()
        answer = await response.json()
    return str(answer["choices"][0]["message"]["content"])


def _body(said: Sequence[str], max_tokens: int) -> dict[str, Any]:
    # A lone text is a question; of several the first is the system's, then users and answers.
    roles = ["user"] if len(said) == 1 else ["system", *["user", "assistant"] * len(said)]
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    return {"model": MODEL, "messages": messages, "max_tokens": max_tokens}


def _words(chance: Random, count: int) -> str:
    return " ".join(f"w{chance.randrange(50_000)}" for _ in range(count))


if __name__ == "__main__":
    sys.exit(main())
