"""A real engine whose pool holds a tenth of its documents: the disk below serves the rest.

What is asked here is what is kept: it is loaded and waited for however busy the machine is.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvkeep.stack.precedence import load_spec
from kvkeep.stack.supervisor import Stack
from kvkeep.validate.answer import Answer
from kvkeep.validate.capability import probe
from kvkeep.validate.load import Endpoint, Sampling
from kvkeep.validate.prompts import documents

NUM_DOCUMENTS = 16
NUM_WORDS = 700
BLOCK_TOKENS = 32
SERVED_SHARE = 0.98
SAMPLING = Sampling(max_tokens=4)

STACK = """\
model: smollm2
exact: true
daemon:
  pool_bytes: 36MiB
  settings: {{planner: load}}
  tiers:
    - {{kind: disk, folder: "{folder}", capacity_bytes: 1GiB}}
engines:
  - name: a
    kv_cache_bytes: 512MiB
    max_model_len: 2048
    connector_settings: {{patience_ms: 5000}}
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One engine, a small pool and a disk."""
    folder = tmp_path_factory.mktemp("tiers")
    file = folder / "stack.yaml"
    file.write_text(STACK.format(folder=folder / "disk"))
    with Stack(load_spec(file), state_dir=folder / "state") as running:
        yield running


async def _ask_all(stack: Stack) -> tuple[list[Answer], dict[str, Any]]:
    """Ask for each document once; returns the answers, and what the daemon says of itself then."""
    prompts = [doc.prompt() for doc in documents(NUM_DOCUMENTS, NUM_WORDS, seed=11)]
    async with (
        Endpoint(stack.engines["a"].url, model=stack.model_name, timeout_s=120.0) as engine,
        Endpoint(stack.daemon.metrics_url, name="daemon") as daemon,
    ):
        await probe(engine)
        await engine.reset_prefix_cache()
        answers = [await engine.chat(prompt.text, SAMPLING) for prompt in prompts]
        await engine.reset_prefix_cache()  # true only when no store is in flight
        status = await daemon.get_json("/status")
        while status["movement"]["cascades_waiting"] or any(
            tier["queued_bytes"] for tier in status["movement"]["tiers"]
        ):
            await asyncio.sleep(0.1)
            status = await daemon.get_json("/status")
        return answers, status


def _served_share(answers: list[Answer]) -> float:
    servable = served = 0
    for answer in answers:
        assert answer.prompt_tokens is not None
        servable += (answer.prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        served += answer.cached_tokens or 0
    return served / servable


@pytest.mark.timeout(600, func_only=True)
def test_a_disk_serves_what_the_pool_can_not_hold(stack: Stack) -> None:
    """The same answers from the disk, and again after everything was killed and the pool lost."""
    computed, status = asyncio.run(_ask_all(stack))
    num_blocks = sum((answer.prompt_tokens or 0) // BLOCK_TOKENS for answer in computed)
    assert num_blocks >= 9 * int(status["gauges"]["slots"])

    replayed, replay_status = asyncio.run(_ask_all(stack))
    stack.engines["a"].kill()
    stack.daemon.kill()
    Path(stack.daemon.pool).unlink()
    stack.daemon.restart()
    stack.engines["a"].restart()
    again, again_status = asyncio.run(_ask_all(stack))

    assert [answer.steps for answer in replayed] == [answer.steps for answer in computed]
    assert [answer.steps for answer in again] == [answer.steps for answer in computed]
    assert _served_share(replayed) >= SERVED_SHARE, _account(replayed, replay_status)
    assert _served_share(again) >= SERVED_SHARE, _account(again, again_status)
    assert replay_status["counters"]["blocks_promoted"] >= 0.8 * num_blocks


def _account(answers: list[Answer], status: dict[str, Any]) -> str:
    """What was served of each document, and what the daemon did."""
    served = [f"{answer.cached_tokens}/{answer.prompt_tokens}" for answer in answers]
    return f"served {' '.join(served)}; {status['counters']}; {status['movement']}"
