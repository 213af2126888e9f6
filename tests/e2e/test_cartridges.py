"""Cartridges on a real engine: answers as with the text, each its own, and never nonsense."""

import asyncio
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvkeep.cartridges.contents import Contents, make_contents
from kvkeep.cartridges.manifest import Draft
from kvkeep.cartridges.registry import Registry
from kvkeep.stack.models import resolve_model
from kvkeep.stack.precedence import load_spec
from kvkeep.stack.supervisor import Stack
from tests.integration.daemons import wait_until

BLOCK_TOKENS = 32
NUM_BLOCKS = 9
NUM_TOKENS = 12
"""Of an answer."""
NOISE_NATS = 0.01
"""In float32, of logprobs between two libraries; a wrong page is off by whole nats."""
TIMEOUT_S = 120.0
CREATED = "2026-01-31T12:00:00Z"
QUESTION = "\n\nQuestion: Which word was painted on the hull, and in which town? Answer: The word"
SHIPS = {
    "a": ("Meridian", "Lisbon", "lighthouses and slow green rivers"),
    "b": ("Saffron", "Bergen", "steam engines, copper pipes and frost"),
    "c": ("Quartz", "Valparaiso", "salt mines and the price of wool"),
}
STACK = """\
model: smollm2
daemon: {{pool_bytes: 512MiB}}
engines:
  - name: a
    kv_cache_bytes: 512MiB
    max_model_len: 2048
    max_num_seqs: 16
    dtype: float32
    cartridges: true
    connector_settings: {{cartridge_library: {library}, patience_ms: 5000}}
"""


@functools.cache
def model_folder() -> str:
    """Where the model lies."""
    return resolve_model("smollm2").location


@functools.cache
def tokenizer() -> Any:
    """The model's own."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder())


def ids_of(text: str) -> list[int]:
    """Token ids of a text."""
    return list(tokenizer()(text)["input_ids"])


def document(name: str) -> list[int]:
    """Token ids of a document that fills blocks, and a few more."""
    word, town, matters = SHIPS[name]
    text = f"The log of the ship. On its hull was painted the word {word}, in the town of {town}. "
    text += f"The captain wrote of {matters}, at length and every day. " * 40
    return ids_of(text)[: NUM_BLOCKS * BLOCK_TOKENS + 5]


def prefill(token_ids: Sequence[int]) -> Contents:
    """KV of tokens, as transformers computes it."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    # A bar that is shown leaves a thread behind.
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    with torch.inference_mode():
        cache = model(torch.tensor([list(token_ids)]), use_cache=True).past_key_values
    layers = [
        tuple(part[0].permute(1, 0, 2).contiguous() for part in (layer.keys, layer.values))
        for layer in cache.layers
    ]
    return make_contents(layers, token_ids=list(token_ids))


def draft(cartridge_id: str, **more: Any) -> Draft:
    """What its maker says."""
    return Draft(
        cartridge_id=cartridge_id, model="smollm2", block_tokens=BLOCK_TOKENS, created=CREATED,
        method="prefill", **more,
    )  # fmt: skip


def whole_blocks(kv: Contents) -> Contents:
    """The same without ids and without the last tokens, as trained ones are."""
    end = NUM_BLOCKS * BLOCK_TOKENS
    import torch

    def cut(tensor: Any) -> Any:
        bits = torch.frombuffer(bytearray(tensor.data), dtype=torch.float32)
        return bits.view(tensor.shape)[:end].contiguous()

    return make_contents([(cut(key), cut(value)) for key, value in kv.layers])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three documents, one of which also without its ids."""
    folder = tmp_path_factory.mktemp("cartridges") / "library"
    with Registry(folder) as registry:
        for name in SHIPS:
            kv = prefill(document(name))
            registry.register_contents(draft(name), kv, pins=name == "a")
            if name == "b":
                registry.register_contents(draft("bare"), whole_blocks(kv))
    return folder


@pytest.fixture(scope="module")
def stack(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A daemon, and an engine that serves cartridges."""
    folder = tmp_path_factory.mktemp("cartridge-stack")
    file = folder / "stack.yaml"
    file.write_text(STACK.format(library=library))
    with Stack(load_spec(file), state_dir=folder / "state") as running:
        yield running


class Asker:
    """One client of an engine."""

    def __init__(self, stack: Stack) -> None:
        self._url = stack.engines["a"].url
        self._model = stack.model_name
        self._client = httpx.Client(timeout=TIMEOUT_S)
        self._stack = stack

    def close(self) -> None:
        """Give its connections back."""
        self._client.close()

    def post(self, prompt: list[int] | str, **more: Any) -> httpx.Response:
        """One completion."""
        body = {"model": self._model, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0,
                "logprobs": 1, "return_tokens_as_token_ids": True, **more}  # fmt: skip
        return self._client.post(f"{self._url}/v1/completions", json=body)

    def ask(self, prompt: list[int] | str, **more: Any) -> "Answered":
        """An answer."""
        response = self.post(prompt, **more)
        assert response.status_code == 200, response.text
        return Answered(response.json())

    def ask_with(self, cartridge_id: str, prompt: list[int] | str, **params: Any) -> "Answered":
        """An answer on a cartridge."""
        return self.ask(prompt, kv_transfer_params={"cartridge_id": cartridge_id, **params})

    def reset(self) -> None:
        """Empty the engine's own cache: what an earlier test left there would not be loaded."""

        def is_reset() -> bool:
            answer = self._client.post(f"{self._url}/reset_prefix_cache")
            return bool(answer.raise_for_status().json()["success"])

        wait_until(is_reset, "the engine's cache is empty")

    def status(self) -> Any:
        """The daemon's."""
        return self._client.get(f"{self._stack.daemon.metrics_url}/status").json()


class Answered:
    """Tokens and their logprobs."""

    def __init__(self, body: Any) -> None:
        choice = body["choices"][0]
        self.tokens = choice["logprobs"]["tokens"]
        self.logprobs = choice["logprobs"]["token_logprobs"]
        self.text = choice["text"]
        self.num_prompt_tokens = body["usage"]["prompt_tokens"]

    def assert_as(self, other: "Answered") -> None:
        """The same tokens, with the same logprobs up to noise."""
        assert self.tokens == other.tokens
        worst = max(abs(a - b) for a, b in zip(self.logprobs, other.logprobs, strict=True))
        assert worst < NOISE_NATS


@pytest.fixture
def asker(stack: Stack) -> Iterator[Asker]:
    """A client."""
    made = Asker(stack)
    yield made
    made.close()


def with_text(asker: Asker, name: str) -> Answered:
    """The answer that the engine computes from the text."""
    return asker.ask([*document(name), *ids_of(QUESTION)])


def test_a_cartridge_answers_as_its_text_does(asker: Asker) -> None:
    """In place of its text and in front of the question; both are loaded and not computed."""
    wanted = with_text(asker, "a")
    asker.reset()
    before = asker.status()["counters"]["blocks_loaded"]

    replaced = asker.ask_with("a", [*document("a"), *ids_of(QUESTION)])

    after = asker.status()["counters"]["blocks_loaded"]
    replaced.assert_as(wanted)
    assert after - before >= NUM_BLOCKS
    prepended = asker.ask_with("a", ids_of(QUESTION), cartridge_mode="prepend")
    prepended.assert_as(wanted)
    assert prepended.num_prompt_tokens == len(document("a")) + len(ids_of(QUESTION))
    (found,) = [each for each in asker.status()["cartridges"] if each["cartridge_id"] == "a"]
    assert (found["state"], found["blocks_resident"]) == ("pinned", NUM_BLOCKS)


def test_placeholders_answer_as_the_text_does(asker: Asker) -> None:
    """A cartridge without ids stands in front as placeholders: all of its answer is its KV's."""
    text = document("b")[: NUM_BLOCKS * BLOCK_TOKENS]
    wanted = asker.ask([*text, *ids_of(QUESTION)])

    asker.ask_with("bare", ids_of(QUESTION)).assert_as(wanted)
    asker.ask_with("bare", QUESTION).assert_as(wanted)


def test_requests_side_by_side_keep_their_own(asker: Asker) -> None:
    """The same prompt on A, B, none, A, C, again and at once: each as with its own text."""
    wanted = {name: with_text(asker, name) for name in SHIPS}
    question = ids_of(QUESTION)
    wanted["none"] = asker.ask(question)
    assert len({tuple(each.tokens) for each in wanted.values()}) >= 3

    def one(name: str) -> Answered:
        if name == "none":
            return asker.ask(question)
        return asker.ask_with(name, question, cartridge_mode="prepend")

    order = ["a", "b", "none", "a", "c"] * 2
    for name in order:
        one(name).assert_as(wanted[name])

    async def at_once() -> list[Answered]:
        return await asyncio.gather(*(asyncio.to_thread(one, name) for name in order))

    for name, answer in zip(order, asyncio.run(at_once()), strict=True):
        assert answer.tokens == wanted[name].tokens


def test_chat_stands_behind_a_cartridge(asker: Asker) -> None:
    """The rendered conversation follows the cartridge's tokens."""
    body = {
        "model": "smollm2", "max_tokens": 4, "temperature": 0,
        "messages": [{"role": "user", "content": "Which word was painted on the hull?"}],
    }  # fmt: skip
    url = f"{asker._url}/v1/chat/completions"
    plain = asker._client.post(url, json=body).json()
    params = {"cartridge_id": "bare"}
    found = asker._client.post(url, json=body | {"kv_transfer_params": params})

    assert found.status_code == 200, found.text
    num_tokens = [each["usage"]["prompt_tokens"] for each in (plain, found.json())]
    assert num_tokens[1] - num_tokens[0] == NUM_BLOCKS * BLOCK_TOKENS


@pytest.mark.parametrize(
    ("params", "more", "why"),
    [
        ({"cartridge_id": "missing"}, {}, "no cartridge 'missing'"),
        ({"cartridge_id": "a"}, {}, "does not begin with cartridge a"),
        ({"cartridge_id": "bare"}, {"prompt_logprobs": 1}, "logprobs"),
        ({"cartridge_id": "bare"}, {"echo": True}, "logprobs"),
    ],
)
def test_what_can_not_be_served_is_a_clear_error(
    asker: Asker, params: dict[str, Any], more: dict[str, Any], why: str
) -> None:
    """Status 400 with one sentence, and the engine goes on."""
    response = asker.post(ids_of(QUESTION), kv_transfer_params=params, **more)

    assert response.status_code == 400
    assert why in response.json()["error"]["message"]
    assert len(asker.ask(ids_of(QUESTION)).tokens) == NUM_TOKENS


@pytest.mark.parametrize("num_tokens", [1, 31, 32, 288, 293])
def test_prompts_of_any_length(asker: Asker, num_tokens: int) -> None:
    """Shorter than a block, as long as one, as the blocks, and as the whole cartridge."""
    prompt = document("c")[:num_tokens]

    asker.ask_with("c", prompt).assert_as(asker.ask(prompt))


def test_a_cartridge_whose_file_is_damaged_fails(asker: Asker, library: Path) -> None:
    """Not one block of it is served, and the client gets an error."""
    with Registry(library) as registry:
        contents = prefill(document("c")[: 2 * BLOCK_TOKENS])
        entry = registry.register_contents(draft("damaged"), contents)
    data = bytearray(entry.path.read_bytes())
    data[len(data) // 2] ^= 1
    entry.path.write_bytes(data)

    response = asker.post(
        ids_of(QUESTION),
        kv_transfer_params={"cartridge_id": "damaged", "cartridge_mode": "prepend"},
    )

    assert response.status_code == 500
    assert len(asker.ask(ids_of(QUESTION)).tokens) == NUM_TOKENS


@pytest.mark.last
def test_a_daemon_killed_in_mid_load(asker: Asker, stack: Stack) -> None:
    """Each answer is right or an error, never the model's fancy; a new daemon brings it back."""
    wanted = asker.ask([*document("b")[: NUM_BLOCKS * BLOCK_TOKENS], *ids_of(QUESTION)])
    question = ids_of(QUESTION)

    def one(idx: int) -> httpx.Response:
        # A salt of its own each: every one of them has to be brought and loaded.
        params = {"cartridge_id": "bare"}
        return asker.post(question, cache_salt=f"killed-{idx}", kv_transfer_params=params)

    async def with_a_kill() -> list[httpx.Response]:
        asked = [asyncio.create_task(asyncio.to_thread(one, idx)) for idx in range(6)]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.to_thread(stack.daemon.kill)
        return list(await asyncio.gather(*asked))

    for response in asyncio.run(with_a_kill()):
        assert response.status_code in (200, 500)
        if response.status_code == 200:
            Answered(response.json()).assert_as(wanted)

    assert one(100).status_code == 500
    stack.daemon.restart()
    for _ in range(100):
        response = one(101)
        if response.status_code == 200:
            break
    Answered(response.json()).assert_as(wanted)
