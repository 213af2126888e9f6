"""A stack of two real engines behind one address, asked by the official client of OpenAI's API.

What its router believes of an engine, from events, is what that engine then reports.
"""

import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from kvkeep.stack.record import bring_down, read_record
from kvkeep.validate.prompts import load_words
from tests.integration.daemons import wait_until

UP_TIMEOUT_S = 280
BACK_TIMEOUT_S = 150.0
REQUEST_TIMEOUT_S = 120.0
BLOCK_TOKENS = 32
# Blocks that are in the pool are loaded, whatever it costs: what is believed is where they are.
STACK = """\
model: smollm2
daemon: {pool_bytes: 256MiB, settings: {planner: load}}
router:
  policy: prefix_aware
  events: true
  settings: {health: {interval_s: 0.5, pause_s: 0.5}}
engines:
  - &engine
    name: a
    kv_cache_bytes: 256MiB
    max_model_len: 1024
    max_num_seqs: 8
    connector_settings: {planner: load}
    args: [--enable-auto-tool-choice, --tool-call-parser, hermes]
  - {<<: *engine, name: b}
"""
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "find_weather",
        "description": "Tell the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What `kvkeep up --detach` says of the stack; its supervisor watches it."""
    folder = tmp_path_factory.mktemp("router")
    file = folder / "stack.yaml"
    file.write_text(STACK + f"state_dir: {folder}/state\n")
    command = [sys.executable, "-m", "kvkeep", "up", str(file), "--detach", "--json", "--quiet"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=UP_TIMEOUT_S
        )
        assert done.returncode == 0, done.stderr
        yield {**json.loads(done.stdout), "folder": folder / "state"}
    finally:
        bring_down(folder / "state")


@pytest.fixture
def client(stack: dict[str, Any]) -> Iterator[openai.OpenAI]:
    url = f"{stack['router']['url']}/v1"
    transport = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, http_client=transport) as made:
        yield made


def seen(stack: dict[str, Any]) -> dict[str, Any]:
    """What the router sees."""
    answer = httpx.get(
        f"{stack['router']['admin_url']}/workers", trust_env=False, timeout=REQUEST_TIMEOUT_S
    )
    found: dict[str, Any] = answer.raise_for_status().json()
    return found


def workers(stack: dict[str, Any]) -> dict[str, Any]:
    """Engines by name."""
    return {each["name"]: each for each in seen(stack)["workers"]}


def test_a_chat_and_a_completion_are_answered(client: openai.OpenAI) -> None:
    """Whole answers with their usage, and a header that says who gave them."""
    raw = client.chat.completions.with_raw_response.create(
        model="smollm2", messages=QUESTION, max_tokens=8, temperature=0
    )
    chat = raw.parse()
    text = client.completions.create(model="smollm2", prompt="One, two,", max_tokens=8)

    assert chat.choices[0].message.content
    assert chat.usage is not None
    assert text.usage is not None
    assert (chat.usage.completion_tokens, text.usage.completion_tokens) == (8, 8)
    assert text.choices[0].text
    assert raw.headers["x-kvkeep-route"].split(";")[0] in ("a", "b")
    assert [model.id for model in client.models.list()] == ["smollm2"]


def test_a_stream_comes_piece_by_piece(client: openai.OpenAI) -> None:
    """Every token, the reason of its end, and its usage where that is asked for."""
    pieces = list(
        client.chat.completions.create(
            model="smollm2",
            messages=QUESTION,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )

    texts = [piece.choices[0].delta.content for piece in pieces if piece.choices]
    reasons = [piece.choices[0].finish_reason for piece in pieces if piece.choices]
    assert sum(bool(text) for text in texts) > 1
    assert [reason for reason in reasons if reason] == ["length"]
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == 12


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_tool_is_called(client: openai.OpenAI, is_stream: bool) -> None:
    """Its name and its arguments arrive; how good these are is the small model's business."""
    asked: dict[str, Any] = {
        "model": "smollm2",
        "messages": QUESTION,
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "find_weather"}},
        "max_tokens": 64,
        "temperature": 0,
    }
    if is_stream:
        names, arguments = [], ""
        for piece in client.chat.completions.create(stream=True, **asked):
            for call in piece.choices[0].delta.tool_calls or ():
                names += [call.function.name] if call.function.name else []
                arguments += call.function.arguments or ""
    else:
        answer = client.chat.completions.create(**asked)
        (call,) = answer.choices[0].message.tool_calls
        names, arguments = [call.function.name], call.function.arguments

    assert names == ["find_weather"]
    assert json.loads(arguments)


def test_a_prompt_goes_where_its_blocks_are(stack: dict[str, Any], client: openai.OpenAI) -> None:
    """The engine says what it holds, in the blocks of tokens that the router cuts prompts into.

    So does the daemon, of what any engine could load.
    """
    prompt = "The quick brown fox jumps over the lazy dog. " * 20

    def ask(prompt: str) -> tuple[str, int]:
        raw = client.completions.with_raw_response.create(
            model="smollm2", prompt=prompt, max_tokens=1
        )
        usage = raw.parse().usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        return raw.headers["x-kvkeep-route"], usage.prompt_tokens_details.cached_tokens or 0

    first, _ = ask(prompt)
    name = first.split(";")[0]
    wait_until(lambda: workers(stack)[name]["prefix_blocks"] > 0, "its events have come")
    again, num_cached = ask(prompt + "Then it rests.")

    assert again.split(";")[0] == name
    assert f"holds {num_cached // BLOCK_TOKENS} of" in again
    assert num_cached >= 160
    assert workers(stack)[name]["is_heard"]
    wait_until(lambda: seen(stack)["gauges"]["pool_blocks"] > 0, "the daemon has said so too")


def test_errors_are_the_client_s_own(client: openai.OpenAI) -> None:
    """An engine's refusal, and one of the router itself, are what the client raises by kind."""
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.completions.create(model="nobody", prompt="x")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="smollm2", prompt="x", max_tokens=-1)
    with pytest.raises(openai.NotFoundError, match="ask for a path under"):
        client.with_options(base_url=str(client.base_url).replace("/v1", "/v9")).models.list()


@pytest.mark.fault
def test_a_killed_engine_is_routed_around_and_comes_back(
    stack: dict[str, Any], client: openai.OpenAI
) -> None:
    """No request fails for it; its supervisor starts it again, and the router asks it again."""

    def ask(number: int) -> int:
        answer = client.completions.create(model="smollm2", prompt=f"{number},", max_tokens=2)
        return answer.usage.completion_tokens if answer.usage else 0

    def is_deaf() -> bool:
        """Whether nobody takes its connections: its children have its socket too, for a while."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) != 0

    folder: Path = stack["folder"]
    port = int(stack["engines"]["b"].rpartition(":")[2])
    before = read_record(folder)
    assert before is not None
    (pid,) = [each.pid for each in before.engines if each.name == "b" and each.pid]
    os.kill(pid, signal.SIGKILL)
    # What it may have begun would fail with it: no request is computed twice.
    wait_until(is_deaf, "it is gone with all its processes")
    with ThreadPoolExecutor(4) as threads:
        counts = list(threads.map(ask, range(16)))
    done = workers(stack)["b"]["requests_done"]
    wait_until(lambda: workers(stack)["b"]["state"] == "ready", "it is back", BACK_TIMEOUT_S)
    with ThreadPoolExecutor(4) as threads:
        counts += list(threads.map(ask, range(16, 32)))
    after = read_record(folder)

    assert counts == [2] * 32
    assert workers(stack)["b"]["requests_done"] > done
    assert after is not None
    assert [each.pid for each in after.engines if each.name == "b"] != [pid]


# --- What the router believes --------------------------------------------------------------------

NUM_CHATS, NUM_TURNS = 6, 4
NUM_DOCUMENTS, NUM_QUESTIONS = 4, 4
ERROR_BLOCKS_MAX = 1
ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Asked:
    """What was believed of a prompt, and what came of it; in blocks."""

    in_cache: int
    """Leading blocks that the router believed to be in the engine's own cache."""
    in_all: int
    """There or in the daemon's pool."""
    reported: int
    """Leading blocks that the engine reported as cached."""
    answer: str

    @property
    def error(self) -> int:
        """How far the belief was off."""
        return abs(self.in_all - self.reported)


@dataclass
class Believed:
    """A router that has one engine to choose from, asked what it believes before each question."""

    url: str
    admin_url: str
    engine_url: str

    def ask(self, path: str, body: dict[str, Any]) -> Asked:
        """Ask what the router believes, then the question itself."""
        asked = {"model": "smollm2", "max_tokens": ANSWER_TOKENS, "temperature": 0, **body}
        with httpx.Client(trust_env=False, timeout=REQUEST_TIMEOUT_S) as client:
            explain = f"{self.admin_url}/explain?path={path}"
            told = client.post(explain, json=asked).raise_for_status().json()
            answer = client.post(f"{self.url}{path}", json=asked)
        found = answer.raise_for_status().json()
        usage, choice = found["usage"], found["choices"][0]
        assert told["num_tokens"] == usage["prompt_tokens"]
        # An engine computes the block of a prompt's last token, though it may hold it.
        most = (usage["prompt_tokens"] - 1) // BLOCK_TOKENS
        (considered,) = told["considered"]
        why = re.match(r"holds (\d+) blocks and (\d+) more in tiers", considered["why"])
        assert why is not None
        in_cache, more = int(why[1]), int(why[2])
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        return Asked(min(in_cache, most), min(in_cache + more, most), cached // BLOCK_TOKENS, text)

    def talk(self, said: list[dict[str, str]], text: str) -> Asked:
        """Say the next turn of a chat; the answer becomes part of it."""
        said.append({"role": "user", "content": text})
        asked = self.ask("/v1/chat/completions", {"messages": said})
        said.append({"role": "assistant", "content": asked.answer})
        return asked

    def reset(self) -> None:
        """Have the engine forget its cache; that it did so it publishes when it next computes."""

        def is_reset() -> bool:
            url = f"{self.engine_url}/reset_prefix_cache"
            answer = httpx.post(url, trust_env=False, timeout=REQUEST_TIMEOUT_S)
            return bool(answer.raise_for_status().json()["success"])

        # Not while stores are under way.
        wait_until(is_reset, "the engine's cache is reset", REQUEST_TIMEOUT_S)
        asked = {"model": "smollm2", "prompt": "One.", "max_tokens": 1}
        url = f"{self.engine_url}/v1/completions"
        httpx.post(url, json=asked, trust_env=False, timeout=REQUEST_TIMEOUT_S).raise_for_status()


@contextlib.contextmanager
def drained(stack: dict[str, Any], name: str) -> Iterator[None]:
    """An engine that gets no requests."""
    url = f"{stack['router']['admin_url']}/workers/{name}"

    def drain(is_drained: bool) -> None:
        asked = {"drain": is_drained}
        httpx.patch(url, json=asked, trust_env=False, timeout=REQUEST_TIMEOUT_S).raise_for_status()

    drain(True)
    try:
        yield
    finally:
        drain(False)


def test_what_is_believed_is_what_the_engine_has(stack: dict[str, Any]) -> None:
    """Chats of several turns and questions about shared documents: off by a block at p95 at most.

    After the engine's cache was reset it is known to hold nothing, and its daemon's pool all.
    """
    router = stack["router"]
    believed = Believed(router["url"], router["admin_url"], stack["engines"]["a"])
    wait_until(lambda: workers(stack)["a"]["is_heard"], "the engine is heard")
    wait_until(lambda: seen(stack)["gauges"]["pools_heard"] == 1, "the pool is heard")
    words = load_words()
    chats: list[list[dict[str, str]]] = [
        [{"role": "system", "content": " ".join(words[: 60 * (number % 2 + 1)])}]
        for number in range(NUM_CHATS)
    ]
    found = []
    with drained(stack, "b"):
        before = seen(stack)["counters"]
        for turn in range(NUM_TURNS):
            for number, said in enumerate(chats):
                begin = 1000 + 100 * (turn * NUM_CHATS + number)
                found.append(believed.talk(said, " ".join(words[begin : begin + 40])))
        for question in range(NUM_QUESTIONS):
            for number in range(NUM_DOCUMENTS):
                document = " ".join(words[5000 + 200 * number : 5200 + 200 * number])
                prompt = f"{document}\nQuestion {question}: {words[question]}"
                found.append(believed.ask("/v1/completions", {"prompt": prompt}))
        counters = seen(stack)["counters"]
        believed.reset()
        again = [believed.talk(list(said), "Go on.") for said in chats]

    assert len(found) == 40
    assert sum(asked.reported for asked in found) > 100
    assert statistics.quantiles([asked.error for asked in found], n=20)[-1] <= ERROR_BLOCKS_MAX
    assert counters["prefixes_checked"] - before["prefixes_checked"] == 40
    assert counters["prefixes_off"] - before["prefixes_off"] <= 2
    assert again[0].in_cache == 0
    assert min(asked.reported for asked in again) > 3
    assert max(asked.error for asked in again) <= ERROR_BLOCKS_MAX
