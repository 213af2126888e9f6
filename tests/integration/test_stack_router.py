"""A stack with a router: one address, engines that come back, and engines that start on demand."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from kvkeep.stack.programs.reaper import start_ticks
from kvkeep.stack.record import bring_down, read_record
from tests.integration.daemons import wait_until
from tests.integration.fake_stacks import UpStack, up_stack
from tests.waiting import HANG_S

QUICK = {"settings": {"health": {"interval_s": 0.2, "pause_s": 0.2}}}


def engine(name: str, **more: object) -> dict[str, object]:
    return {"name": name, "connector": "none", "kv_cache_bytes": "1MiB", **more}


@pytest.fixture(scope="module")
def stack() -> Iterator[UpStack]:
    """Two engines of one model, and three that start on demand, one of them slow, one broken."""
    later = {"on_demand": True, "idle_stop_s": 0.5}
    engines = [
        engine("a", served_model_name="m"),
        engine("b", served_model_name="m"),
        engine("c", served_model_name="later", **later),
        engine("d", served_model_name="broken", **later),
        engine("e", served_model_name="slow", **later | {"start_wait_s": 1}),
    ]
    values = {"router": QUICK, "engines": engines, "served_model_name": "m"}
    with up_stack(values, "d.broken", "e.slow") as found:
        assert [found.starts(name) for name in "cde"] == [[], [], []]
        yield found


def pid_of(stack: UpStack, name: str) -> int:
    """0 while it is started again."""
    record = read_record(stack.state)
    assert record is not None
    return next((entry.process.pid for entry in record.processes if entry.name == name), 0)


def in_flight(stack: UpStack, name: str) -> int:
    """Requests that an engine works on."""
    found = {each["name"]: each["in_flight"] for each in stack.workers()["workers"]}
    return int(found.get(name, 0))


def is_all_ready(stack: UpStack) -> bool:
    """Whether both engines that are always there can be asked."""
    try:
        workers = stack.workers()["workers"]
    except httpx.HTTPError:
        return False
    return [each["state"] for each in workers if each["name"] in "ab"] == ["ready", "ready"]


def test_one_address_serves_all_engines(stack: UpStack) -> None:
    """Ready means that each engine can be asked; those on demand are known and not started."""
    answers = {stack.ask("m").json()["choices"][0]["text"] for _ in range(4)}

    assert answers == {str(stack.starts("a")[-1]), str(stack.starts("b")[-1])}
    record = read_record(stack.state)
    assert record is not None
    assert [entry.name for entry in record.processes][-1] == "router"
    assert [each.on_demand for each in record.engines] == [False, False, True, True, True]


def test_top_shows_a_stack_by_its_file(stack: UpStack) -> None:
    """Nobody has to know the router's admin port."""
    stack.ask("m")
    file = stack.folder / "s.yaml"
    file.write_text(f"state_dir: {stack.state}\nengines: [{{name: a}}]\n")
    command = [sys.executable, "-m", "kvkeep", "top", str(file), "--once", "--json"]
    done = subprocess.run(command, capture_output=True, check=True)

    router = json.loads(done.stdout)["router"]
    assert router["total"]["requests_done"] > 0
    assert [each["name"] for each in router["on_demand"]] == ["c", "d", "e"]


@pytest.mark.fault
def test_a_killed_engine_is_routed_around_and_comes_back(stack: UpStack) -> None:
    """No request fails for it, and it answers again on its old port with a new pid."""
    before = stack.starts("a")
    os.kill(pid_of(stack, "engine a"), signal.SIGKILL)
    codes = {stack.ask("m").status_code for _ in range(12)}
    wait_until(lambda: len(stack.starts("a")) > len(before), "the engine is started again")
    wait_until(lambda: is_all_ready(stack), "the router asks it again")
    answers = {stack.ask("m").json()["choices"][0]["text"] for _ in range(4)}

    assert codes == {200}
    assert str(stack.starts("a")[-1]) in answers


@pytest.mark.fault
def test_a_killed_router_comes_back_at_its_address(stack: UpStack) -> None:
    """Clients need not learn anything new, and engines are not started anew for it."""
    starts = (stack.starts("a"), stack.starts("b"))
    before = pid_of(stack, "router")
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: pid_of(stack, "router") not in (0, before), "the router is started again")
    wait_until(lambda: is_all_ready(stack), "it has found its engines")

    assert stack.ask("m").status_code == 200
    assert (stack.starts("a"), stack.starts("b")) == starts


def test_models_are_known_before_they_run(stack: UpStack) -> None:
    """Clients find them in the list; one that is in no engine is a clear 404 and starts nothing."""
    models = httpx.get(f"{stack.url}/v1/models", trust_env=False, timeout=HANG_S).json()["data"]
    unknown = stack.ask("nothing")

    assert {each["id"] for each in models} >= {"m", "later", "broken", "slow"}
    assert unknown.status_code == 404
    assert "'nothing'" in unknown.json()["error"]["message"]
    assert unknown.json()["error"]["type"] == "not_found_error"


def test_the_first_requests_start_one_engine(stack: UpStack) -> None:
    """All of them are answered by it; it stops when it is idle, and starts again when asked."""
    wait_until(lambda: stack.states()["c"] == "stopped", "what another test had started is gone")
    before = len(stack.starts("c"))
    # Answered when all of them are there: between two of them the engine would be idle.
    hold = stack.file("c.hold")
    hold.touch()
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(stack.ask, "later", "hold") for _ in range(8)]
        wait_until(lambda: in_flight(stack, "c") == 8, "all of them are with the engine")
        hold.unlink()
        answers = [each.result() for each in asked]
    starts = stack.starts("c")[before:]
    wait_until(lambda: stack.states()["c"] == "stopped", "the idle engine is stopped")
    is_gone = start_ticks(starts[0]) is None
    again = stack.ask("later")

    assert [each.status_code for each in answers] == [200] * 8
    assert {each.json()["choices"][0]["text"] for each in answers} == {str(starts[0])}
    assert len(starts) == 1
    assert is_gone
    assert again.json()["choices"][0]["text"] == str(stack.starts("c")[-1]) != str(starts[0])
    assert "an engine is started on demand. name=c" in stack.log_text()


def test_an_engine_with_a_request_is_not_stopped(stack: UpStack) -> None:
    """It may take much longer than the time after which an idle one is stopped."""
    hold, holds = stack.file("c.hold"), stack.file("c.holds")
    holds.unlink(missing_ok=True)
    hold.touch()
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(stack.ask, "later", "hold")
        wait_until(holds.exists, "the engine has the request")
        seen = stack.workers()
        uptime_s = seen["gauges"]["uptime_s"]
        wait_until(
            lambda: stack.workers()["gauges"]["uptime_s"] > uptime_s + 1.5,
            "three times the idle time",
        )
        states = stack.states()
        hold.unlink()
        answer = asked.result()

    assert states["c"] == "ready"
    assert answer.status_code == 200


@pytest.mark.fault
def test_an_engine_on_demand_that_is_killed_starts_at_the_next_request(stack: UpStack) -> None:
    """Its end is noticed, and costs the next client the time of a start, not an error."""
    first = stack.ask("later").json()["choices"][0]["text"]
    os.kill(int(first), signal.SIGKILL)
    wait_until(lambda: stack.states()["c"] == "stopped", "its end is known")
    answer = stack.ask("later")

    assert answer.status_code == 200
    assert answer.json()["choices"][0]["text"] != first


def test_a_start_that_fails_is_tried_once_more_and_told(stack: UpStack) -> None:
    """Its clients get the reason and when to ask again; later ones cost no further start."""
    failed = stack.ask("broken")
    starts = len(stack.starts("d"))
    refused = stack.ask("broken")

    for answer in (failed, refused):
        assert answer.status_code == 503
        assert 0 < int(answer.headers["retry-after"]) <= 30
        error = answer.json()["error"]
        assert error["type"] == "overloaded_error"
        assert "ValueError: this engine is broken" in error["message"]
    assert starts == len(stack.starts("d")) == 2


def test_a_request_waits_for_a_start_no_longer_than_its_time(stack: UpStack) -> None:
    """503 with Retry-After; the model is served once it can be."""
    late = stack.ask("slow")
    stack.file("e.slow").unlink()
    wait_until(lambda: stack.ask("slow").status_code == 200, "it has started after all")

    assert late.status_code == 503
    assert int(late.headers["retry-after"]) > 0
    assert "the engine for slow" in late.json()["error"]["message"]


def test_a_pair_is_announced_with_its_roles() -> None:
    """The router knows who does what; a short prompt is not worth a hand-off."""
    engines = [
        {**engine("d", served_model_name="m"), "role": "decode", "connector": "nixl"},
        {**engine("p", served_model_name="m"), "role": "prefill", "connector": "nixl"},
    ]
    with up_stack({"router": QUICK, "engines": engines}) as stack:
        roles = {each["name"]: each["role"] for each in stack.workers()["workers"]}
        answer = stack.ask("m")

    assert roles == {"d": "decode", "p": "prefill"}
    assert answer.status_code == 200
    assert answer.headers["x-kvkeep-route"].startswith("d;")


def test_down_lets_requests_come_to_their_end() -> None:
    """What runs is answered while nothing new is taken, and nothing is left afterwards."""
    engines = [engine("a", served_model_name="m")]
    with up_stack({"router": {"drain_s": 30}, "engines": engines}, "a.hold") as stack:
        with ThreadPoolExecutor(2) as threads:
            asked = threads.submit(stack.ask, "m", "hold")
            wait_until(stack.file("a.holds").exists, "the engine has the request")
            down = threads.submit(bring_down, stack.state)
            admin = stack.told["router"]["admin_url"]
            wait_until(
                lambda: (
                    httpx.get(f"{admin}/ready", trust_env=False, timeout=HANG_S).status_code == 503
                ),
                "the router takes nothing new",
            )
            stack.file("a.hold").unlink()
            answer, stopped = asked.result(), down.result()
        code = stack.wait()

    assert answer.status_code == 200
    assert stopped == ["router", "engine a"]
    assert code == 0
    assert not Path(stack.state / "stack.json").exists()
