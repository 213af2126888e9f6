"""A router that cuts prompts into its engines' own blocks and hears what becomes of them."""

import asyncio
import contextlib
import json
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import zmq.asyncio

from tests.integration.routers import ROUTE, Announced, engines, environment, router, wait_for
from tests.integration.test_router_events import Publisher
from tests.waiting import HANG_S

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

BLOCK_TOKENS = 4
WORDS = [f"w{number}" for number in range(100)]
PROMPT = WORDS[: 4 * BLOCK_TOKENS + 1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of words."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {word: number for number, word in enumerate(["[UNK]", *WORDS])}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    made = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "WhitespaceSplit"}}
    (folder / "tokenizer.json").write_text(json.dumps(made))
    return folder


class Telling:
    """Publishes block events as one engine, from a thread of its own."""

    def __init__(self, addresses: Sequence[str] = ()) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="telling")
        self._thread.start()
        self._context = zmq.asyncio.Context()
        self._publisher = self._call(self._make(addresses))
        self.addresses = self._publisher.addresses

    async def _make(self, addresses: Sequence[str]) -> Publisher:
        publisher = Publisher(self._context, addresses)
        self._serving = asyncio.create_task(publisher.serve())
        return publisher

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(HANG_S)

    def stored(self, words: Sequence[str]) -> None:
        """The engine stored these words' blocks, all of one prompt."""
        tokens = [WORDS.index(word) + 1 for word in words]
        event = {
            "type": "BlockStored",
            "block_hashes": list(range(1, len(words) // BLOCK_TOKENS + 1)),
            "parent_block_hash": None,
            "token_ids": tokens,
            "block_size": BLOCK_TOKENS,
        }
        self._call(self._publisher.publish(event))

    def cleared(self) -> None:
        """The engine's cache is empty."""
        self._call(self._publisher.publish({"type": "AllBlocksCleared"}))

    async def _end(self) -> None:
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)
        self._context.destroy(linger=0)

    def close(self) -> None:
        """End without a word."""
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(HANG_S)
        self._loop.close()


@contextlib.contextmanager
def telling(addresses: Sequence[str] = ()) -> Iterator[Telling]:
    made = Telling(addresses)
    try:
        yield made
    finally:
        made.close()


def member(url: str, told: Telling) -> dict[str, Any]:
    publish, replay = told.addresses
    return {"url": url, "name": "told", "events": {"publish": publish, "replay": replay}}


def exact(model: Path, *members: Any) -> dict[str, Any]:
    own = {"policy": "prefix_aware", "tokenizer": str(model), "block_tokens": BLOCK_TOKENS}
    return {**own, "engines": list(members)}


def explained(process: Announced, words: Sequence[str] = PROMPT) -> tuple[str, str]:
    """Where a prompt would go, and why."""
    answer = httpx.post(
        f"{process.ready['admin_url']}/explain?path=/v1/completions",
        json={"prompt": " ".join(words)},
        trust_env=False,
        timeout=HANG_S,
    )
    found = answer.raise_for_status().json()
    return found["endpoint"], found["reason"]


def until_told(process: Announced, num_blocks: int) -> None:
    def is_so(told: dict[str, Any]) -> bool:
        found = {each["name"]: each["prefix_blocks"] for each in told["workers"]}
        return found.get("told") == num_blocks

    wait_for(process, is_so)


def test_prompts_go_where_events_say_their_blocks_are(model: Path) -> None:
    """What an engine told before and after the router came decides, and what it lost does not."""
    with engines(2) as urls, telling() as told:
        told.stored(PROMPT[:8])
        with router(urls, exact(model, urls[0], member(urls[1], told))) as process:
            until_told(process, 2)
            before = explained(process)
            told.stored(PROMPT[:16])
            until_told(process, 4)
            after = explained(process)
            told.cleared()
            until_told(process, 0)

            assert before == ("told", "holds 2 of 4 blocks")
            assert after == ("told", "holds 4 of 4 blocks")
            assert "holds 0 of 4 blocks" in explained(process)[1]


def test_requests_are_relayed_by_their_tokens(model: Path) -> None:
    """A request goes to the engine that told of its blocks, and its response says so."""
    with engines(2) as urls, telling() as told:
        told.stored(PROMPT[:16])
        with router(urls, exact(model, urls[0], member(urls[1], told))) as process:
            until_told(process, 4)
            answers = [
                httpx.post(
                    f"{process.ready['url']}/v1/completions",
                    json={"prompt": " ".join(PROMPT), "max_tokens": 2},
                    trust_env=False,
                    timeout=HANG_S,
                )
                for _ in range(3)
            ]

            assert [answer.status_code for answer in answers] == [200] * 3
            routes = {answer.headers["x-kvkeep-route"] for answer in answers}
            assert routes == {"told; prefix_aware; holds 4 of 4 blocks"}


def test_engines_are_heard_as_long_as_they_are_in(model: Path) -> None:
    """Over the API an engine joins with its events, leaves, and is heard again when it returns."""
    with engines(2) as urls, telling() as told:
        told.stored(PROMPT[:16])
        with router(urls[:1], exact(model, urls[0])) as process:
            admin = process.ready["admin_url"]
            for _ in range(2):
                joined = httpx.post(
                    f"{admin}/workers", json=member(urls[1], told), trust_env=False, timeout=HANG_S
                )
                until_told(process, 4)
                wait_for(process, lambda told: told["gauges"]["endpoints_ready"] == 2)
                at = explained(process)
                httpx.delete(
                    f"{admin}/workers/told", trust_env=False, timeout=HANG_S
                ).raise_for_status()
                left = wait_for(process, lambda told: len(told["workers"]) == 1)

                assert joined.status_code == 201
                assert at == ("told", "holds 4 of 4 blocks")
                assert left["gauges"]["engines_heard"] == 0
                assert left["gauges"]["prefix_blocks"] == 0


def test_an_engine_that_was_killed_is_known_anew(model: Path) -> None:
    """One that comes back under its address holds what it tells, not what it held before."""
    with engines(1) as urls, contextlib.ExitStack() as stack:
        with telling() as killed:
            killed.stored(PROMPT[:16])
            process = stack.enter_context(router(urls, exact(model, member(urls[0], killed))))
            until_told(process, 4)
        restarted = stack.enter_context(telling(killed.addresses))
        restarted.stored(WORDS[50:62])
        until_told(process, 3)
        at = explained(process)
        told = wait_for(process, lambda told: told["gauges"]["engines_heard"] == 1)

        assert "holds 0 of 4 blocks" in at[1]
        assert told["counters"]["events_losses"] == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"events": {"publish": "tcp://127.0.0.1:1"}}, "tokenizer"),
        ({"tokenizer": "/nowhere", "policy": "prefix_aware"}, "tokenizer.json"),
        ({"tokenizer": "x", "events": {"publish": "127.0.0.1:1"}}, "events"),
        ({"tokenizer": "x", "events": {"replay": "tcp://127.0.0.1:1"}}, "publish"),
    ],
)
def test_settings_that_can_not_work_are_refused(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    """One sentence names the setting; nothing is served."""
    file = tmp_path / "router.yaml"
    file.write_text(json.dumps({"engines": ["http://127.0.0.1:1"], "port": 0, **settings}))
    ended = subprocess.run(
        [*ROUTE, "--config", str(file)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
        check=False,
    )

    assert ended.returncode == 2
    assert said in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
