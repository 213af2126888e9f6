"""Below its limits a router serves everybody; above them it says so, to each, in time."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.integration.gated_engine import Gate, Got, chat, gated_engines
from tests.integration.routers import Announced, router, workers
from tests.waiting import HANG_S

SECRET = "sk-0123456789abcdef"
RUNNING_MAX, WAITING_MAX = 100, 100
PATIENCE_S = 120.0


class Scene:
    """A router before two engines, and a client with as many connections as it likes."""

    def __init__(self, process: Announced, session: aiohttp.ClientSession, gate: Gate) -> None:
        self.process, self.session, self.gate = process, session, gate

    def ask(self, count: int, key: str = "") -> list["asyncio.Task[Got]"]:
        url = self.process.ready["url"]
        return [
            asyncio.create_task(chat(self.session, url, f"question {i}", key=key))
            for i in range(count)
        ]

    async def until(self, *, running: int, waiting: int) -> None:
        """Until so many requests run and wait."""
        async with asyncio.timeout(PATIENCE_S):
            while await self.gauges() != (running, waiting):
                pass

    async def gauges(self) -> tuple[int, int]:
        told = (await asyncio.to_thread(workers, self.process))["gauges"]
        return told["requests_running"], told["requests_waiting"]


@contextlib.asynccontextmanager
async def opened(limits: dict[str, Any]) -> AsyncIterator[Scene]:
    gate = Gate()
    async with gated_engines(2, gate) as urls:
        # The engines live on this event loop: whoever waits for them must not hold it up.
        context = router(urls, {"limits": limits, "policy": "least_loaded"})
        process = await asyncio.to_thread(context.__enter__)
        try:
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(connector=connector) as session:
                yield Scene(process, session, gate)
        finally:
            gate.opened.set()
            await asyncio.to_thread(context.__exit__, None, None, None)


def check_refused(got: Got, *statuses: int) -> None:
    assert got.status in statuses
    assert got.retry_after is not None
    assert 1 <= int(got.retry_after) <= 60
    assert got.error is not None
    assert {"message", "type", "param", "code"} <= got.error.keys()


@pytest.mark.parametrize("count", [20, 100, 300])
async def test_all_are_served_or_told(count: int) -> None:
    """What runs or waits completes, whole; what is beyond is refused while the others run."""
    limits = {"in_flight_max": RUNNING_MAX, "queue_max": WAITING_MAX, "queue_wait_s": 60.0}
    async with opened(limits) as scene:
        scene.gate.opened.clear()
        asked = scene.ask(count)
        running, waiting = min(count, RUNNING_MAX), min(max(0, count - RUNNING_MAX), WAITING_MAX)
        await scene.until(running=running, waiting=waiting)
        num_refused = count - running - waiting
        async with asyncio.timeout(PATIENCE_S):
            while len(done := [task for task in asked if task.done()]) < num_refused:
                await asyncio.wait(set(asked) - set(done), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                check_refused(task.result(), 503)
            scene.gate.opened.set()
            found = await asyncio.gather(*asked)
        told = workers(scene.process)

    whole = [got for got in found if got.is_whole]
    assert len(whole) == running + waiting
    assert told["total"]["requests_done"] == running + waiting
    assert told["refused"]["queue_full"] == num_refused
    assert {got.route.partition(";")[0] for got in whole} == {w["name"] for w in told["workers"]}


async def test_who_waits_in_vain_is_told() -> None:
    """At the end of the announced wait, while another one's stream goes on and completes."""
    limits = {"in_flight_max": 1, "queue_max": 10, "queue_wait_s": 0.3}
    async with opened(limits) as scene:
        scene.gate.opened.clear()
        (first,) = scene.ask(1)
        await scene.until(running=1, waiting=0)
        late = await asyncio.wait_for(asyncio.gather(*scene.ask(5)), PATIENCE_S)
        scene.gate.opened.set()
        got = await first

    assert got.is_whole
    for each in late:
        check_refused(each, 503)


async def test_keys_have_limits_of_their_own(tmp_path: Path) -> None:
    """One key beyond its share gets 429, an unknown one 401, and others are served."""
    keys = tmp_path / "keys.json"
    entries = [
        {"name": "few", "key": SECRET + "-few", "in_flight_max": 20},
        {"name": "slow", "key": SECRET + "-slow", "requests_per_s": 0.02, "burst": 3},
        {"name": "free", "key": SECRET + "-free"},
    ]
    keys.write_text(json.dumps(entries))
    keys.chmod(0o600)
    async with opened({"keys_file": str(keys)}) as scene:
        scene.gate.opened.clear()
        few = scene.ask(30, SECRET + "-few")
        await scene.until(running=20, waiting=0)
        slow, free = scene.ask(8, SECRET + "-slow"), scene.ask(5, SECRET + "-free")
        unknown = await scene.ask(1, SECRET + "-none")[0]
        await scene.until(running=28, waiting=0)
        scene.gate.opened.set()
        found = {
            name: await asyncio.gather(*tasks)
            for name, tasks in (("few", few), ("slow", slow), ("free", free))
        }

    served = {name: sum(got.is_whole for got in gots) for name, gots in found.items()}
    assert served == {"few": 20, "slow": 3, "free": 5}
    for got in (got for gots in found.values() for got in gots if not got.is_whole):
        check_refused(got, 429)
    assert (unknown.status, unknown.retry_after) == (401, None)
    assert unknown.error is not None


async def test_strangers_are_told_before_they_have_sent_it_all(tmp_path: Path) -> None:
    """The head is enough for a 401: nothing of a body is kept for who may not ask."""
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps([{"name": "one", "key": SECRET + "-one"}]))
    keys.chmod(0o600)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n{"
    async with opened({"keys_file": str(keys)}) as scene:
        port = int(scene.process.ready["url"].rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head)
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), HANG_S)
        writer.close()
        refused = (await asyncio.to_thread(workers, scene.process))["refused"]

    assert answer.startswith(b"HTTP/1.1 401 ")
    assert refused["invalid_api_key"] == 1


async def test_prompt_tokens_have_a_rate_of_their_own(tmp_path: Path) -> None:
    """Long prompts are counted as they come, and put right by what engines say; errors are free."""
    keys = tmp_path / "keys.json"
    read = {"name": "read", "key": SECRET + "-read"}
    # Nothing to speak of comes back while the test runs.
    rate = {"prompt_tokens_per_min": 0.06, "prompt_tokens_burst": 2500}
    keys.write_text(json.dumps([read | rate]))
    keys.chmod(0o600)
    text = "x" * 4000
    async with opened({"keys_file": str(keys)}) as scene:
        url, key = scene.process.ready["url"], read["key"]

        async def ask() -> Got:
            return await chat(scene.session, url, text, key=key)

        scene.gate.opened.clear()
        running = [asyncio.create_task(ask()) for _ in range(2)]
        await scene.until(running=2, waiting=0)
        beyond = await ask()
        scene.gate.opened.set()
        first = await asyncio.gather(*running)
        body = {"model": "fake-model", "messages": text}
        headers = {"Authorization": f"Bearer {key}"}
        wrong = []
        for _ in range(4):
            async with scene.session.post(
                f"{url}/v1/chat/completions", json=body, headers=headers
            ) as answer:
                wrong.append(answer.status)
        later = [await ask() for _ in range(4)]
        told = workers(scene.process)

    assert (beyond.status, told["refused"]["token_limit_exceeded"]) == (429, 1)
    assert beyond.retry_after is not None
    assert beyond.error is not None
    assert "prompt tokens each minute" in beyond.error["message"]
    assert wrong == [400] * 4
    assert all(got.is_whole for got in [*first, *later])
