"""An engine at work whose daemon freezes or dies: right answers, steps that do not wait."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from kvkeep.client.connection import Connection
from tests.integration.daemons import Daemon, running_daemon, wait_until
from tests.integration.simulated_engines import (
    SimulatedEngine,
    answer_to,
    make_config,
    simulated_engine,
    write_model,
)

PROMPT = [(position * 7919) % 1000 for position in range(200)]
PROMPTS = {name: [*PROMPT, number] for number, name in enumerate("abcd")}
NUM_TOKENS = 20
LOOKUP_WAIT_S = 0.002
"""The default of lookup_wait_ms: all that a step may wait for its lookups."""
REATTACH_LIMIT_S = 5.0


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder, and a user cache folder of the test's own."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path / "cache"))
    return write_model(tmp_path / "model")


@contextmanager
def busy_engine(model: Path, num_steps: int) -> Iterator[tuple[Daemon, SimulatedEngine]]:
    """An engine some steps into four requests whose common part its daemon holds."""
    with (
        running_daemon() as daemon,
        simulated_engine(make_config(model, daemon.socket)) as engine,
    ):
        engine.add("stored", PROMPT)
        engine.run()
        assert engine.reset_local()
        for name, tokens in PROMPTS.items():
            engine.add(name, tokens, NUM_TOKENS)
        for _ in range(num_steps):
            engine.step()
        yield daemon, engine


@pytest.fixture
def waits_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the engine's thread was ready to wait for a daemon, each time that it did."""
    found: list[float] = []
    engine_thread = threading.current_thread()
    receive, call = Connection.receive, Connection.call

    def watched_receive(self: Connection, wait_s: float) -> Any:
        if threading.current_thread() is engine_thread:
            found.append(wait_s)
        return receive(self, wait_s)

    def watched_call(self: Connection, message: Any, kind: Any, timeout_s: float) -> Any:
        assert threading.current_thread() is not engine_thread
        return call(self, message, kind, timeout_s)

    monkeypatch.setattr(Connection, "receive", watched_receive)
    monkeypatch.setattr(Connection, "call", watched_call)
    return found


def are_attached(engine: SimulatedEngine) -> bool:
    """Whether both halves have a session."""
    scheduler: Any = engine.scheduler.connector
    worker: Any = engine.ranks[0].connector
    link = worker._worker._attachment.link
    return scheduler._scheduler._prefixes.is_connected and link.connection is not None


def check_loads_again(engine: SimulatedEngine) -> None:
    """Both halves find the daemon in time, and what was stored is loaded.

    An engine that was idle notices with its next request that its daemon had died.
    """
    engine.add("notices", list(range(100)))
    engine.run()
    wait_until(lambda: are_attached(engine), "both halves are attached", REATTACH_LIMIT_S)
    assert engine.reset_local()
    before = engine.num_loaded_tokens
    engine.add("again", PROMPT, NUM_TOKENS)
    engine.run()
    assert engine.answers["again"] == answer_to(PROMPT, NUM_TOKENS)
    assert engine.num_loaded_tokens > before


def check_answers(engine: SimulatedEngine) -> None:
    """All four were answered right."""
    found = {name: engine.answers[name] for name in PROMPTS}
    assert found == {name: answer_to(tokens, NUM_TOKENS) for name, tokens in PROMPTS.items()}


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_a_frozen_daemon_costs_hits_and_nothing_else(
    model: Path, num_steps: int, waits_s: list[float]
) -> None:
    """Frozen before, amid or after the loads of four requests, it holds no step up."""
    with busy_engine(model, num_steps) as (daemon, engine):
        daemon.signal(signal.SIGSTOP)
        engine.run()
        daemon.signal(signal.SIGCONT)

        check_answers(engine)
        assert max(waits_s) <= LOOKUP_WAIT_S
        check_loads_again(engine)


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_a_killed_daemon_costs_hits_and_nothing_else(
    model: Path, num_steps: int, waits_s: list[float]
) -> None:
    """Killed before, amid or after the loads of four requests; its successor goes on."""
    with busy_engine(model, num_steps) as (daemon, engine):
        daemon.kill()
        engine.run()
        daemon.start()

        check_answers(engine)
        assert max(waits_s) <= LOOKUP_WAIT_S
        check_loads_again(engine)
