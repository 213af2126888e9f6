"""A router that is operated: engines die, come back, join and leave, and it stops in good order."""

import asyncio
import contextlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

from tests.integration.gated_engine import Gate, Got, chat, gated_engines
from tests.integration.routers import (
    ENGINE,
    ROUTE,
    Announced,
    engines,
    environment,
    router,
    wait_for,
    workers,
)
from tests.servers.processes import free_port
from tests.waiting import HANG_S

PATIENCE_S = 120.0


def states(told: dict[str, Any]) -> Counter[str]:
    return Counter(worker["state"] for worker in told["workers"])


def gauge_is(name: str, value: float) -> Callable[[dict[str, Any]], bool]:
    return lambda told: bool(told["gauges"][name] == value)


async def ask(url: str, count: int, *, is_stream: bool = True, at_once: int = 8) -> list[Got]:
    """Ask different questions, some at once."""
    connector = aiohttp.TCPConnector(limit=at_once)
    async with aiohttp.ClientSession(connector=connector) as session:
        texts = [f"question {i % 7} of {'some ' * i}words" for i in range(count)]
        asked = [chat(session, url, text, is_stream=is_stream) for text in texts]
        return await asyncio.wait_for(asyncio.gather(*asked), PATIENCE_S)


def top(process: Announced) -> dict[str, Any]:
    command = [sys.executable, "-m", "kvkeep", "top", "--once", "--json"]
    done = subprocess.run(
        [*command, "--router", process.ready["admin_url"]],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_totals_are_what_clients_counted() -> None:
    """Requests, tokens and those from caches, streamed and whole; in all and over the engines."""
    with engines(2) as urls, router(urls) as process:
        url = process.ready["url"]
        got = asyncio.run(ask(url, 30)) + asyncio.run(ask(url, 20, is_stream=False))
        found = top(process)

    total, listed = found["router"]["total"], found["router"]["workers"]
    assert all(each.is_whole for each in got)
    expected = {
        "requests_done": len(got),
        "requests_failed": 0,
        "requests_untold": 0,
        "prompt_tokens": sum(each.usage["prompt_tokens"] for each in got),
        "completion_tokens": sum(each.usage["completion_tokens"] for each in got),
        "cached_tokens": sum(each.usage["prompt_tokens_details"]["cached_tokens"] for each in got),
    }
    assert expected["cached_tokens"] > 0
    assert {name: total[name] for name in expected} == expected
    for name, value in total.items():
        assert sum(worker[name] for worker in listed) == value
    assert total["response_bytes"] > sum(each.num_bytes for each in got)
    assert found["hits"]["engine_tokens"] == expected["cached_tokens"]
    assert sum(worker["in_flight"] for worker in listed) == 0


def test_an_engine_that_dies_is_routed_around_and_comes_back() -> None:
    """No request fails for it, from the first one on; back on its port it is asked again."""
    # Probes alone would not find out in time: requests do.
    settings = {"health": {"interval_s": 3600.0, "pause_s": 0.2, "timeout_s": HANG_S}}
    with engines(1) as urls, contextlib.ExitStack() as stack:
        mortal = Announced([*ENGINE, "--port", str(free_port())])
        stack.callback(mortal.stop)
        process = stack.enter_context(router([*urls, mortal.ready["url"]], settings))
        url, port = process.ready["url"], mortal.ready["url"].rpartition(":")[2]
        assert all(each.is_whole for each in asyncio.run(ask(url, 8)))
        mortal.kill()
        got = asyncio.run(ask(url, 20))
        assert all(each.is_whole for each in got)
        told = workers(process)
        assert states(told) == {"ready": 1, "down": 1}
        assert told["counters"]["retries"] >= 1
        done = told["workers"][1]["requests_done"]
        stack.callback(Announced([*ENGINE, "--port", port]).stop)
        wait_for(process, lambda found: states(found)["ready"] + states(found)["suspect"] == 2)
        assert all(each.is_whole for each in asyncio.run(ask(url, 20)))
        told = workers(process)

    assert told["workers"][1]["requests_done"] > done
    assert states(told) == {"ready": 2}


def test_open_files_are_allowed_for_or_the_start_is_refused(tmp_path: Path) -> None:
    """A router that ran out of them would leave clients hanging."""
    config = tmp_path / "router.yaml"
    command = [*ROUTE, "http://127.0.0.1:1", "--port", "0", "--config", str(config)]

    def started(connections_max: int) -> subprocess.Popen[bytes]:
        config.write_text(json.dumps({"relay": {"connections_max": connections_max}}))
        return subprocess.Popen(
            ["prlimit", "--nofile=200:1000", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    with started(300) as few:
        assert few.stdout is not None
        few.stdout.readline()
        limits = Path(f"/proc/{few.pid}/limits").read_text()
        few.terminate()
    with started(1000) as many:
        said = many.communicate(timeout=PATIENCE_S)[1].decode()

    (soft,) = [line.split()[3] for line in limits.splitlines() if "open files" in line]
    assert int(soft) >= 600
    assert (many.returncode, said.count("\n")) == (2, 1)
    assert "lower relay.connections_max" in said


def test_without_any_engine_a_client_is_told(tmp_path: Path) -> None:
    """503 with Retry-After, at once; an engine that then joins over the API serves."""
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text("engines: []")
    with router([], {"engines_file": str(fleet)}) as process, engines(1) as urls:
        (refused,) = asyncio.run(ask(process.ready["url"], 1))
        assert (refused.status, refused.is_whole) == (503, False)
        assert refused.retry_after is not None
        answer = asyncio.run(post(f"{process.ready['admin_url']}/workers", {"url": urls[0]}))
        assert answer == 201
        wait_for(process, lambda found: states(found)["ready"] == 1)
        (got,) = asyncio.run(ask(process.ready["url"], 1))

    assert got.is_whole


async def post(url: str, body: dict[str, Any]) -> int:
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
        return answer.status


def test_the_file_of_engines_may_change(tmp_path: Path) -> None:
    """One leaves, another joins; a broken file changes nothing and is shown in the metrics."""
    fleet = tmp_path / "fleet.json"

    def write(text: str) -> None:
        # At once: the router must not find a file that is begun, which would be a broken one.
        (whole := tmp_path / "whole").write_text(text)
        whole.replace(fleet)

    with engines(2) as urls:
        write(json.dumps({"engines": [{"url": urls[0], "name": "first"}]}))
        with router([], {"engines_file": str(fleet)}) as process:
            wait_for(process, lambda found: states(found)["ready"] == 1)
            write(json.dumps({"engines": [{"url": urls[1], "name": "second"}]}))
            wait_for(
                process,
                lambda found: (
                    [(w["name"], w["state"]) for w in found["workers"]] == [("second", "ready")]
                ),
            )
            write("engines: [")
            told = wait_for(process, lambda found: not found["gauges"]["is_engines_file_good"])
            (got,) = asyncio.run(ask(process.ready["url"], 1))

    assert [worker["name"] for worker in told["workers"]] == ["second"]
    assert told["counters"]["engines_file_errors"] == 1
    assert got.route.startswith("second;")


async def test_a_router_that_is_told_to_stop_ends_what_it_began() -> None:
    """What runs and what waits completes; whoever comes later is refused; the code is 0."""
    gate = Gate()
    async with gated_engines(1, gate) as urls, aiohttp.ClientSession() as session:
        context = router(urls, {"limits": {"in_flight_max": 2, "queue_wait_s": 60.0}})
        process = await asyncio.to_thread(context.__enter__)
        try:
            gate.opened.clear()
            url = process.ready["url"]
            asked = [asyncio.create_task(chat(session, url, f"q {i}")) for i in range(4)]
            await asyncio.to_thread(wait_for, process, gauge_is("requests_waiting", 2))
            process.terminate()
            await asyncio.to_thread(wait_for, process, gauge_is("is_draining", 1))
            with contextlib.suppress(aiohttp.ClientConnectionError):
                late = await chat(session, url, "late")
                assert (late.status, late.retry_after) == (503, "1")
            gate.opened.set()
            got = await asyncio.wait_for(asyncio.gather(*asked), PATIENCE_S)
            code = await asyncio.to_thread(process.process.wait, PATIENCE_S)
        finally:
            gate.opened.set()
            await asyncio.to_thread(context.__exit__, None, None, None)

    assert all(each.is_whole for each in got)
    assert code == 0
