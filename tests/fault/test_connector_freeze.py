"""An engine at work whose daemon freezes or dies: right answers, steps that do not wait."""

import itertools
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs
import pytest

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
PATIENCE = {"patience_ms": 250}


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
        simulated_engine(make_config(model, daemon.socket, extra=PATIENCE)) as engine,
    ):
        engine.add("stored", PROMPT)
        engine.run()
        assert engine.reset_local()
        for name, tokens in PROMPTS.items():
            engine.add(name, tokens, NUM_TOKENS)
        for _ in range(num_steps):
            engine.step()
        yield daemon, engine


def are_attached(engine: SimulatedEngine) -> bool:
    """Whether both halves have a session."""
    scheduler: Any = engine.scheduler.connector
    worker: Any = engine.ranks[0].connector
    link = worker._worker._attachment.link
    return scheduler._scheduler._prefixes.is_connected and link.connection is not None


def check_loads_again(engine: SimulatedEngine) -> None:
    """Both halves find the daemon, and what was stored is loaded.

    An engine that was idle notices with its next request that its daemon had died, and one whose
    daemon is slow to answer computes.
    """
    engine.add("notices", list(range(100)))
    engine.run()
    names = (f"again-{number}" for number in itertools.count())

    def is_loaded() -> bool:
        wait_until(lambda: are_attached(engine), "both halves are attached")
        assert engine.reset_local()
        before, name = engine.num_loaded_tokens, next(names)
        engine.add(name, PROMPT, NUM_TOKENS)
        engine.run()
        assert engine.answers[name] == answer_to(PROMPT, NUM_TOKENS)
        return engine.num_loaded_tokens > before

    wait_until(is_loaded, "it is loaded")


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
