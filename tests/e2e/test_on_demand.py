"""Real engines that start at their first request, come too late, die, and stop when idle.

They are stock vLLM: what one of them says itself, and what the check says of it, is asked here too.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvkeep.stack.record import bring_down, read_record
from tests.e2e.test_check_command import check_determinism
from tests.integration.daemons import wait_until

UP_TIMEOUT_S = 280
START_TIMEOUT_S = 150.0
STACK = """\
model: smollm2
daemon: {enabled: false}
router: {settings: {health: {interval_s: 0.5, pause_s: 0.5}}}
engines:
  - &engine
    name: late
    on_demand: true
    idle_stop_s: 0
    start_wait_s: 150
    connector: none
    kv_cache_bytes: 128MiB
    max_model_len: 2048
    max_num_seqs: 4
  - {<<: *engine, name: hasty, served_model_name: hasty, start_wait_s: 0.5, idle_stop_s: 1}
"""


@dataclass
class UpStack:
    """A stack that `kvkeep up` keeps up."""

    told: dict[str, Any]
    folder: Path

    def ask(self, model: str) -> httpx.Response:
        body = {"model": model, "prompt": "One, two,", "max_tokens": 4, "temperature": 0}
        url = f"{self.told['router']['url']}/v1/completions"
        return httpx.post(url, json=body, timeout=START_TIMEOUT_S, trust_env=False)

    def url_of(self, engine: str) -> str:
        """An engine's own address."""
        record = read_record(self.folder)
        assert record is not None
        (url,) = [each.url for each in record.engines if each.name == engine]
        return url

    def states(self) -> dict[str, str]:
        """What the router says of its engines on demand."""
        url = f"{self.told['router']['admin_url']}/workers"
        found = httpx.get(url, trust_env=False, timeout=60).raise_for_status().json()["on_demand"]
        return {each["name"]: each["state"] for each in found}

    def pids(self) -> dict[str, int]:
        """Of engines that run."""
        record = read_record(self.folder)
        assert record is not None
        return {
            entry.name.removeprefix("engine "): entry.process.pid
            for entry in record.processes
            if entry.name.startswith("engine ") and entry.process.is_alive()
        }

    def models(self) -> set[str]:
        url = f"{self.told['router']['url']}/v1/models"
        return {each["id"] for each in httpx.get(url, trust_env=False, timeout=60).json()["data"]}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpStack]:
    """Two engines that nobody has asked for yet."""
    folder = tmp_path_factory.mktemp("demand")
    file = folder / "stack.yaml"
    file.write_text(STACK + f"state_dir: {folder}/state\n")
    command = [sys.executable, "-m", "kvkeep", "up", str(file), "--detach", "--json", "--quiet"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=UP_TIMEOUT_S
        )
        assert done.returncode == 0, done.stderr
        yield UpStack(json.loads(done.stdout), folder / "state")
    finally:
        bring_down(folder / "state")


@dataclass
class FirstRequests:
    """What the first ones met; both engines started meanwhile, and one of them is gone again."""

    pids_before: dict[str, int]
    unknown: httpx.Response
    states_after_unknown: dict[str, str]
    patient: httpx.Response
    hasty: httpx.Response
    hasty_pid: int


@pytest.fixture(scope="module")
def first(stack: UpStack) -> FirstRequests:
    """Asked once for all tests: a start costs tens of seconds on two cores."""
    pids_before = stack.pids()
    unknown = stack.ask("nobody")
    states_after_unknown = stack.states()
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(stack.ask, "smollm2")
        hasty = stack.ask("hasty")
        wait_until(lambda: "hasty" in stack.pids(), "it is being started")
        hasty_pid = stack.pids()["hasty"]
        patient = asked.result()
    return FirstRequests(pids_before, unknown, states_after_unknown, patient, hasty, hasty_pid)


def test_the_first_request_starts_the_engine_and_is_answered(
    stack: UpStack, first: FirstRequests
) -> None:
    """Its model was listed while nothing ran; the client only waits."""
    assert first.pids_before == {}
    assert stack.models() >= {"smollm2", "hasty"}
    assert first.patient.status_code == 200, first.patient.text
    assert first.patient.json()["usage"]["completion_tokens"] == 4


def test_a_request_that_can_t_wait_is_told_when_to_come_again(first: FirstRequests) -> None:
    """503 with Retry-After, and how far the engine is; it goes on starting."""
    assert first.hasty.status_code == 503
    assert int(first.hasty.headers["retry-after"]) > 0
    error = first.hasty.json()["error"]
    assert error["type"] == "overloaded_error"
    assert "the engine for hasty still starts" in error["message"]


def test_an_idle_engine_is_stopped(stack: UpStack, first: FirstRequests) -> None:
    """With all its processes; another one that may stay idle stays."""
    wait_until(lambda: stack.states()["hasty"] == "stopped", "it has stopped", START_TIMEOUT_S)

    assert first.hasty_pid not in stack.pids().values()


def test_an_unknown_model_is_a_clear_404(first: FirstRequests) -> None:
    """It starts nothing."""
    assert first.unknown.status_code == 404
    assert first.unknown.json()["error"]["type"] == "not_found_error"
    assert "'nobody'" in first.unknown.json()["error"]["message"]
    assert set(first.states_after_unknown.values()) == {"stopped"}


def test_a_real_engine_answers(stack: UpStack, first: FirstRequests) -> None:
    """The packaged model, as converted, knows the capital of France, and says what it reused."""
    question = {"role": "user", "content": "What is the capital of France?"}
    body = {"model": "smollm2", "temperature": 0, "max_tokens": 16, "messages": [question]}

    reply = httpx.post(
        f"{stack.url_of('late')}/v1/chat/completions", json=body, timeout=60, trust_env=False
    ).json()

    assert reply["choices"][0]["message"]["content"] == "The capital of France is Paris."
    # The chat template adds the system prompt the model was trained with: 37 tokens in all.
    assert reply["usage"]["prompt_tokens"] == 37
    assert "cached_tokens" in reply["usage"]["prompt_tokens_details"]


def test_a_real_engine_s_cache_can_be_reset(stack: UpStack, first: FirstRequests) -> None:
    """The launcher opens the endpoint that the checks reset the cache with."""
    url = f"{stack.url_of('late')}/reset_prefix_cache"

    assert httpx.post(url, timeout=60, trust_env=False).json() == {"success": True}


@pytest.mark.kvbm
def test_an_engine_without_kvkeep_is_not_exercised(
    stack: UpStack, first: FirstRequests, tmp_path: Path
) -> None:
    """Nothing is served after its reset: the check must not pass."""
    found = check_determinism(tmp_path, "--url", stack.url_of("late"))

    assert found == (1, ["not-exercised"])


@pytest.mark.nightly  # a third start; with engines that pretend it is in every run
@pytest.mark.fault
def test_a_killed_engine_starts_at_the_next_request(stack: UpStack, first: FirstRequests) -> None:
    """Its end is noticed; the next client waits for another start, and is answered the same."""
    before = stack.pids()["late"]
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: stack.states()["late"] == "stopped", "its end is known", 60)
    answer = stack.ask("smollm2")

    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == first.patient.json()["choices"]
    assert stack.pids()["late"] != before
