"""The connector driven by vLLM's own scheduler, with a real daemon and a model of arithmetic."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest

from kvkeep.tiers.shared_memory import PoolView
from kvkeep.tiers.slot_header import SlotState
from tests.integration.daemons import Daemon, Vandal, connect, running_daemon, wait_until
from tests.integration.simulated_engines import (
    BLOCK_TOKENS,
    SimulatedEngine,
    answer_to,
    make_config,
    simulated_engine,
    write_model,
)

PROMPT = [(position * 7919) % 1000 for position in range(200)]
PROMPT_LOADED = 192
"""Tokens of the prompt that can be loaded: whole blocks, one token left to compute."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user cache folder of the test's own."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path / "cache"))


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A daemon of the test's own."""
    with running_daemon() as found:
        yield found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder."""
    return write_model(tmp_path / "model")


def ask(
    engine: SimulatedEngine,
    req_id: str,
    token_ids: list[int],
    num_tokens: int = 4,
    salt: str | None = None,
) -> int:
    """One request from its arrival to its right answer; gives the tokens that were loaded."""
    before = engine.num_loaded_tokens
    engine.add(req_id, token_ids, num_tokens, salt=salt)
    engine.run()

    assert engine.answers[req_id] == answer_to(token_ids, num_tokens)
    return engine.num_loaded_tokens - before


def check_answers(engine: SimulatedEngine, prompts: dict[str, list[int]], num_tokens: int) -> None:
    """These requests were answered right, and nothing is held for any."""
    found = {req_id: engine.answers[req_id] for req_id in prompts}
    assert found == {name: answer_to(tokens, num_tokens) for name, tokens in prompts.items()}
    assert engine.reset_local()


class Damage:
    """Changes what a daemon's pool holds, where it lies."""

    def __init__(self, daemon: Daemon) -> None:
        connection = connect(daemon)
        assert connection.welcome is not None
        self._view = PoolView.open(connection.welcome.pool_path, connection.welcome.pool_id)
        self._vandal = Vandal(self._view)
        connection.close()

    def flip(self, byte_idx: int, *, part: str = "payload", first: int = 0) -> None:
        """Flip a bit of that byte in every slot that holds a block, from the ``first`` on."""
        slots = range(self._view.geometry.num_slots)
        ready = [slot for slot in slots if self._vandal.header(slot)[14] == SlotState.READY]
        for slot in ready[first:]:
            self._vandal.flip(getattr(self._vandal, part)(slot), byte_idx * 8 + 3)


# ---- the ordinary life


def test_a_prefix_comes_back_after_a_reset(daemon: Daemon, model: Path) -> None:
    """What an engine computed it loads after its own cache was emptied, and answers the same."""
    with simulated_engine(make_config(model, daemon.socket)) as engine:
        assert ask(engine, "cold", PROMPT, 30) == 0
        assert ask(engine, "local", PROMPT, 30) == 0
        assert engine.reset_local()
        assert ask(engine, "loaded", PROMPT, 30) == PROMPT_LOADED
        assert engine.reset_local()
        longer = PROMPT + answer_to(PROMPT, 30)
        assert ask(engine, "longer", longer) == 224

    assert daemon.counter("blocks_stored") == 14


@pytest.mark.parametrize(("stored_by", "loaded_by"), [(1, 2), (2, 1), (2, 4), (4, 1)])
def test_engines_with_other_numbers_of_ranks_share(
    daemon: Daemon, model: Path, stored_by: int, loaded_by: int
) -> None:
    """What one engine stored another loads, each rank its heads, replicated ones too."""
    with simulated_engine(make_config(model, daemon.socket, tp_size=stored_by)) as engine:
        assert ask(engine, "a", PROMPT) == 0
    with simulated_engine(make_config(model, daemon.socket, tp_size=loaded_by)) as engine:
        assert ask(engine, "a", PROMPT) == PROMPT_LOADED


@pytest.mark.parametrize("tp_size", [1, 2])
def test_several_ranks_rest_while_only_stores_go_on(
    daemon: Daemon, model: Path, monkeypatch: pytest.MonkeyPatch, tp_size: int
) -> None:
    """In no step that computes; one rank alone leaves a core to the daemon."""
    may_rest: list[tuple[bool, bool]] = []
    with simulated_engine(make_config(model, daemon.socket, tp_size=tp_size)) as engine:
        step = engine.step

        def watched() -> Any:
            output = step()
            is_computing = bool(output.num_scheduled_tokens)
            may_rest.append((is_computing, output.kv_connector_metadata.may_rest))
            return output

        monkeypatch.setattr(engine, "step", watched)
        ask(engine, "a", PROMPT, 1)

    assert (True, True) not in may_rest
    assert ((False, True) in may_rest) is (tp_size > 1)


def test_hooks_are_called_in_this_order(daemon: Daemon, model: Path) -> None:
    """The order of calls in a step, on which the connector rests (vllm 0.32)."""
    called: list[str] = []
    with simulated_engine(make_config(model, daemon.socket)) as engine:
        ask(engine, "stored", PROMPT)
        engine.reset_local()
        for half in (engine.scheduler.connector, engine.ranks[0].connector):
            for name in HOOKS:
                trace(half, name, called)
        engine.add("loaded", PROMPT)
        engine.step()

    assert called == HOOKS


HOOKS = [
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "start_load_kv",
    "wait_for_save",
    "get_block_ids_with_load_errors",
    "build_connector_worker_meta",
    "update_connector_output",
]


def trace(half: Any, name: str, called: list[str]) -> None:
    """Note each call of a hook."""
    hook = getattr(half, name)

    def traced(*args: Any, **more: Any) -> Any:
        called.append(name)
        return hook(*args, **more)

    setattr(half, name, traced)


def test_other_weights_and_other_tenants_load_nothing(
    daemon: Daemon, model: Path, tmp_path: Path
) -> None:
    """Engines over one daemon share only what they would have computed alike."""
    other = write_model(tmp_path / "other", b"weighty")
    configs = [
        make_config(model, daemon.socket),
        make_config(other, daemon.socket),
        make_config(model, daemon.socket, extra={"tenant": "b"}),
    ]
    for config in configs:
        with simulated_engine(config) as engine:
            assert ask(engine, "a", PROMPT) == 0
    with simulated_engine(make_config(model, daemon.socket)) as engine:
        assert ask(engine, "a", PROMPT) == PROMPT_LOADED


def test_tenants_of_one_engine_and_of_one_name_never_meet(
    daemon: Daemon, model: Path, tmp_path: Path
) -> None:
    """One prompt under two cache salts, or two secrets, is stored twice and never shared."""
    secrets = [tmp_path / "one", tmp_path / "two"]
    for byte, path in enumerate(secrets):
        path.write_bytes(bytes([byte]) * 32)
        path.chmod(0o600)
    for path in secrets:
        extra = {"tenant": "t", "tenant_key_file": str(path)}
        with simulated_engine(make_config(model, daemon.socket, extra=extra)) as engine:
            for salt in (None, "x", "y"):
                assert ask(engine, f"cold {salt}", PROMPT, salt=salt) == 0
            assert engine.reset_local()
            for salt in (None, "x", "y"):
                assert ask(engine, f"warm {salt}", PROMPT, salt=salt) == PROMPT_LOADED


def test_a_reset_of_the_connector_ends_what_was_stored(daemon: Daemon, model: Path) -> None:
    """After it an engine loads nothing of before, and what it stores then serves it again."""
    with simulated_engine(make_config(model, daemon.socket)) as engine:
        ask(engine, "before", PROMPT)
        assert engine.scheduler.reset_prefix_cache(reset_connector=True)
        assert ask(engine, "after", PROMPT) == 0
        assert engine.reset_local()
        assert ask(engine, "again", PROMPT) == PROMPT_LOADED


def test_preempted_requests_answer_right(daemon: Daemon, model: Path) -> None:
    """In an engine too small for its requests they are preempted, load again, and all end well."""
    prompts = {name: PROMPT[shift : shift + 100] for shift, name in enumerate("abcd")}
    with simulated_engine(make_config(model, daemon.socket), num_blocks=26) as engine:
        requests = [engine.add(name, tokens, 120) for name, tokens in prompts.items()]
        engine.run()

        assert sum(request.num_preemptions for request in requests) >= 2
        assert engine.num_loaded_tokens > 0
        check_answers(engine, prompts, 120)


@pytest.mark.parametrize("num_steps", range(6))
def test_an_abort_disturbs_nobody(daemon: Daemon, model: Path, num_steps: int) -> None:
    """Whenever a request's client goes, others that share its prefix answer right."""
    prompts = {"stays": PROMPT, "shares": [*PROMPT[:150], 1, 2, 3]}
    with simulated_engine(make_config(model, daemon.socket)) as engine:
        ask(engine, "stored", PROMPT[:100])
        engine.reset_local()
        engine.add("goes", PROMPT, 8)
        for name, tokens in prompts.items():
            engine.add(name, tokens, 8)
        for _ in range(num_steps):
            engine.step()
        engine.abort("goes")
        engine.run()

        check_answers(engine, prompts, 8)
        wait_until(lambda: daemon.gauge("read_leases") == 0, "leases are given back")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_namespaces_are_equal_across_processes(model: Path) -> None:
    """Two processes with other hash seeds give one model's blocks the same names."""
    code = (
        "import sys, pathlib\n"
        "from tests.integration.simulated_engines import make_cache_config, make_config\n"
        "from kvkeep.connector.identity import derive, derive_layout\n"
        "from kvkeep.connector.settings import ConnectorSettings\n"
        "config = make_config(pathlib.Path(sys.argv[1]), 's')\n"
        "layout = derive_layout(config, make_cache_config(1, 8))\n"
        "print(derive(config, layout, ConnectorSettings(socket='s')).hex())\n"
    )
    root = Path(__file__).parents[2]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(model)],
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root), "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for seed in ("1", "2")
    ]
    found = {run.communicate()[0].splitlines()[-1] for run in runs}

    assert len(found) == 1
    assert len(found.pop()) == 64


# ---- failed loads


@pytest.mark.parametrize(("part", "byte_idx"), [("payload", 5000), ("digests", 40), ("header", 80)])
def test_damaged_blocks_are_computed_and_replaced(
    daemon: Daemon, model: Path, part: str, byte_idx: int
) -> None:
    """A block that rotted in the pool costs a recomputation, once: then it is stored anew."""
    with simulated_engine(make_config(model, daemon.socket)) as engine:
        ask(engine, "stored", PROMPT)
        Damage(daemon).flip(byte_idx, part=part, first=5)
        engine.reset_local()
        assert ask(engine, "damaged", PROMPT) == PROMPT_LOADED
        engine.reset_local()
        ask(engine, "again", PROMPT)
        engine.reset_local()
        failures = daemon.counter("load_failures")
        assert ask(engine, "right", PROMPT) == PROMPT_LOADED

    assert failures > 0
    assert daemon.counter("load_failures") == failures


@pytest.mark.parametrize("threshold", [0, 16], ids=["whole", "slices"])
def test_requests_that_share_a_failed_load_answer_right(
    daemon: Daemon, model: Path, threshold: int
) -> None:
    """Those that found the prefix in the engine, where it never arrived, compute it too."""
    prompts = {name: [*PROMPT, number] for number, name in enumerate(("first", "next", "third"))}
    config = make_config(model, daemon.socket, long_prefill_token_threshold=threshold)
    with simulated_engine(config) as engine:
        ask(engine, "stored", PROMPT)
        Damage(daemon).flip(77)
        engine.reset_local()
        for name, tokens in prompts.items():
            engine.add(name, tokens, 20)
        engine.run()

        check_answers(engine, prompts, 20)
        assert ask(engine, "later", PROMPT, 20) > 0


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_nobody_reads_what_an_aborted_request_did_not_load(
    daemon: Daemon, model: Path, num_steps: int
) -> None:
    """A request whose load failed may go before it has computed; its prefix is no hit then."""
    prompts = {"shares": [*PROMPT, 1], "later": [*PROMPT, 2]}
    with simulated_engine(make_config(model, daemon.socket, step_tokens=32)) as engine:
        ask(engine, "stored", PROMPT)
        Damage(daemon).flip(99)
        engine.reset_local()
        engine.add("goes", PROMPT)
        engine.add("shares", prompts["shares"], 8)
        for _ in range(num_steps):
            engine.step()
        engine.abort("goes")
        engine.add("later", prompts["later"], 8)
        engine.run()

        check_answers(engine, prompts, 8)


@pytest.mark.parametrize(("tp_size", "bad_rank"), [(2, 0), (2, 1), (4, 1), (4, 3)])
def test_a_load_that_failed_on_one_rank_spoils_no_stored_block(
    daemon: Daemon, model: Path, tp_size: int, bad_rank: int
) -> None:
    """What the other ranks computed beside it is not stored, even by those whose load was fine."""
    longer = [*PROMPT, *range(100)]
    with simulated_engine(make_config(model, daemon.socket, tp_size=tp_size)) as engine:
        ask(engine, "stored", PROMPT)
        engine.reset_local()
        mover = engine.ranks[bad_rank].connector._worker._mover
        right = mover.load
        for _ in range(2):  # a rank that failed before must be as careful the next time
            mover.load = lambda _pool, slots, *_: np.zeros(len(slots), dtype=np.bool_)
            engine.add("failed", longer, 20)
            engine.step()
            mover.load = right
            engine.run()
            check_answers(engine, {"failed": longer}, 20)
            longer = [*longer, *range(50)]
    with simulated_engine(make_config(model, daemon.socket)) as engine:
        assert ask(engine, "sound", longer, 20) > len(longer) // 2 // BLOCK_TOKENS * BLOCK_TOKENS


# ---- a daemon that goes and comes


def test_answers_outlive_the_daemon(daemon: Daemon, model: Path) -> None:
    """Killed between steps, a daemon takes nothing along but hits; its successor has the blocks."""
    prompts = {name: PROMPT[shift:] for shift, name in enumerate("abc")}
    with simulated_engine(make_config(model, daemon.socket)) as engine:
        ask(engine, "stored", PROMPT)
        engine.reset_local()
        for name, tokens in prompts.items():
            engine.add(name, tokens, 10)
        engine.step()
        daemon.kill()
        engine.run()
        check_answers(engine, prompts, 10)
        assert ask(engine, "without", PROMPT) == 0
        daemon.start()
        scheduler: Any = engine.scheduler.connector
        wait_until(lambda: scheduler._scheduler._prefixes.is_connected, "the daemon is found")
        engine.reset_local()
        assert ask(engine, "with", PROMPT) == PROMPT_LOADED


def test_an_engine_starts_without_a_daemon_and_joins_it(
    daemon: Daemon, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for a daemon that is not there; when it comes, blocks are stored and loaded."""
    daemon.kill()
    config = make_config(model, daemon.socket, extra={"start_wait_s": 0})
    with simulated_engine(config) as engine:
        assert ask(engine, "without", PROMPT) == 0
        daemon.start()
        worker: Any = engine.ranks[0].connector._worker
        scheduler: Any = engine.scheduler.connector
        wait_until(
            lambda: (
                worker._attachment.link.connection and scheduler._scheduler._prefixes.is_connected
            ),
            "both halves find the daemon",
        )
        engine.reset_local()
        assert ask(engine, "stored", PROMPT) == 0
        engine.reset_local()
        assert ask(engine, "loaded", PROMPT) == PROMPT_LOADED

    assert "no kvkeep daemon at" in caplog.text
