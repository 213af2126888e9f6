"""How the live view reckons and looks; real routers are in tests/integration."""

import io
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from kvkeep.cli.main import main
from kvkeep.cli.top import hits, render


def worker(name: str, done: int) -> dict[str, Any]:
    return {
        "name": name,
        "state": "ready",
        "role": "serve",
        "in_flight": 2,
        "ttft_s": 0.25,
        "requests_done": done,
        "requests_failed": 1,
        "prompt_tokens": 1000 * done,
        "cached_tokens": 500 * done,
        "completion_tokens": 10 * done,
        "response_bytes": done << 20,
    }


def page(done: int) -> dict[str, Any]:
    router = {
        "policy": "prefix_aware",
        "gauges": {"requests_running": 2.0, "requests_waiting": 0.0, "uptime_s": 61.0},
        "counters": {"retries": 3},
        "refused": {"queue_full": 4, "draining": 1},
        "total": {"requests_done": 2 * done, "requests_failed": 2, "cached_tokens": 77},
        "workers": [worker("a", done), worker("b", done)],
    }
    return {"router": router, "daemons": {}, "hits": {"engine_tokens": 77}}


def shown(found: dict[str, Any], before: dict[str, Any] | None, passed_s: float) -> str:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as captured:
        console.print(render(found, before, passed_s))
    return captured.get()


def test_one_look_shows_totals() -> None:
    """With units that a person reads."""
    text = shown(page(3), None, 0.0)
    (row,) = [line.split() for line in text.splitlines() if line.startswith("a ")]

    assert "prefix_aware, 2 running, 0 waiting, 6 done, 2 failed, 5 refused, 3 retried" in text
    assert row == ["a", "ready", "2", "250", "ms", "3", "1", "3,000", "1,500", "30", "3.0", "MiB"]


def test_two_looks_show_what_changes() -> None:
    """Each second; an engine that was not there before began at nothing."""
    before = page(3)
    del before["router"]["workers"][1]
    rows = {
        line.split()[0]: line.split()[5:]
        for line in shown(page(7), before, 2.0).splitlines()
        if line.startswith(("a ", "b "))
    }

    assert rows["a"] == ["2", "0", "2,000", "1,000", "20", "2.0", "MiB"]
    assert rows["b"] == ["4", "0", "3,500", "1,750", "35", "3.5", "MiB"]


def test_hand_offs_are_shown_by_how_they_ended() -> None:
    """With roles of engines; what never happened is left out."""
    found = page(1)
    found["router"]["workers"][0]["role"] = "prefill"
    found["router"]["handoff"] = {
        "transport": "nixl",
        "outcomes": {"handed_off": 1200, "failed": 0},
        "skips": {"short": 7, "warm": 0},
        "fallbacks": {"prefill_timeout": 2},
    }

    lines = [line.strip() for line in shown(found, None, 0.0).splitlines()]

    told = "1,200 handed off, 7 skipped as short, 2 after prefill timeout"
    assert f"hand-offs  nixl: {told}" in lines
    assert any(line.startswith("a") and "ready prefill" in line for line in lines)


def test_engines_on_demand_are_shown_while_they_do_not_run() -> None:
    """With what they do, and who waits for it."""
    found = page(1)
    found["router"]["on_demand"] = [
        {"name": "c", "models": ["m"], "state": "starting", "doing": "loading", "waiting": 3},
        {"name": "d", "models": ["n"], "state": "stopped", "doing": "", "waiting": 0},
    ]

    lines = [line.strip() for line in shown(found, None, 0.0).splitlines()]

    assert "on demand  c, for m: starting (loading), 3 waiting" in lines
    assert "on demand  d, for n: stopped, 0 waiting" in lines


def test_hits_are_counted_by_place() -> None:
    """Over all daemons; a tier's name is its place."""
    daemon = {
        "counters": {"blocks_loaded": 5},
        "movement": {"tiers": [{"name": "disk", "reads": {"num_done": 3}}, {"name": "s3"}]},
    }
    found = hits(page(1)["router"], {"one": daemon, "two": daemon, "bare": {"counters": {}}})

    assert found == {"engine_tokens": 77, "pool_blocks": 10, "disk": 6, "s3": 0}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--router URL"),
        (["s", "--router", "http://127.0.0.1:1"], "not both"),
        (["no-stack-of-this-name"], "No stack is up"),
        (["--router", "http://127.0.0.1:1", "--json"], "add --once"),
        (["--router", "http://127.0.0.1:1", "--interval-s", "0"], "too short"),
        (["--router", "http://127.0.0.1:1", "--admin-key-file", "/none/there"], "can't be read"),
        (["--router", "nonsense", "--once"], "no router answers"),
        (["--router", "http://127.0.0.1:1"], "no terminal"),
    ],
)
def test_what_can_not_be_shown_is_said(arguments: list[str], said: str) -> None:
    """In one sentence, with code 2."""
    done = CliRunner().invoke(main, ["top", *arguments])

    assert (done.exit_code, said in done.output) == (2, True)
    assert done.output.count("\n") == 1
