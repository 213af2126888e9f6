"""From bodies to prefixes: one form for what is the same, other hashes for what is not."""

import asyncio
import json
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvkeep.model.errors import InputError
from kvkeep.router.prefix_hashes import TEXT_BLOCK_BYTES, token_hashes, token_root
from kvkeep.router.request import RequestView
from kvkeep.router.tokenizing import (
    WAIT_S,
    Prefix,
    Prefixes,
    Tokenizing,
    approximate_prefix,
    load_tokenizer,
)

LONG = "All the world's a stage, and all the men and women merely players. " * 20
BLOCK_TOKENS = 4


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def hashes_of(**fields: Any) -> list[int]:
    prefix = approximate_prefix(body(**fields))
    assert prefix is not None
    return prefix.hashes


def test_the_next_turn_begins_with_the_one_before() -> None:
    """All full blocks of a conversation's prompt are the first blocks of its next prompt."""
    first = hashes_of(messages=[user(LONG)])
    answer = {"role": "assistant", "content": "Indeed."}
    second = hashes_of(messages=[user(LONG), answer, user(LONG)])

    assert len(first) >= 5
    assert second[: len(first)] == first
    assert len(second) > len(first)


def test_what_says_the_same_has_the_same_prefix() -> None:
    """Order and spacing of fields, other fields, and text in parts make no difference."""
    plain = hashes_of(messages=[user(LONG)])
    in_parts = [{"content": [{"type": "text", "text": LONG}], "role": "user"}]

    assert plain == hashes_of(temperature=1, messages=in_parts, stream=True)


@pytest.mark.parametrize(
    "other",
    [
        {"messages": [{"role": "system", "content": LONG}]},
        {"messages": [user("x" + LONG)]},
        {"messages": [user(LONG)], "cache_salt": "tenant"},
        {"messages": [user(LONG)], "tools": [{"type": "function", "function": {"name": "f"}}]},
    ],
    ids=["role", "text", "salt", "tools"],
)
def test_what_differs_at_the_beginning_shares_nothing(other: dict[str, Any]) -> None:
    """Another role, text, salt or tool makes another KV from the first block on."""
    assert not set(hashes_of(messages=[user(LONG)])) & set(hashes_of(**other))


def test_a_late_difference_leaves_the_beginning() -> None:
    """Blocks before the first difference are shared, none after it."""
    cut = 3 * TEXT_BLOCK_BYTES
    one, other = hashes_of(prompt=LONG), hashes_of(prompt=LONG[:cut] + "!" + LONG[cut + 1 :])

    assert one[:3] == other[:3]
    assert not set(one[3:]) & set(other[3:])


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"{",
        b"[]",
        b'{"messages": 1}',
        b'{"messages": [1]}',
        b'{"prompt": {}}',
        b'{"messages": ' + b"[" * 100_000,
        b"\xff",
        b'{"prompt": "\\ud800"}',
    ],
)
def test_a_body_that_can_not_be_read_has_no_prefix(broken: bytes) -> None:
    """Bad bodies are for the engine to refuse; here they only have no prefix."""
    assert approximate_prefix(broken) is None


@pytest.mark.parametrize(
    "odd",
    [b"{}", b'{"prompt": null}', b'{"prompt": [[1, 2], "x", null]}', b'{"messages": []}'],
)
def test_an_odd_prompt_is_survived(odd: bytes) -> None:
    """Lists of lists, and nothing at all, are prompts without a full block."""
    prefix = approximate_prefix(odd)

    assert prefix is not None
    assert prefix.hashes == []


class Words:
    """A tokenizer of words; ``gate`` holds it up."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.ids_seen: list[str] = []

    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> "Words.Encoded":
        self.gate.wait(30)
        if "explode" in sequence:
            raise RuntimeError("a defect")
        ids = [len(word) for word in sequence.split()]
        return Words.Encoded([1, *ids] if add_special_tokens else ids)

    class Encoded:
        def __init__(self, ids: list[int]) -> None:
            self.ids = ids


@pytest.fixture
def words() -> Words:
    return Words()


@pytest.fixture
def tokenizing(words: Words) -> Iterator[Tokenizing]:
    def render(messages: list[Any], tools: list[Any] | None, **more: Any) -> str:
        return " ".join(f"<{each['role']}> {each['content']}" for each in messages)

    made = Tokenizing(words, BLOCK_TOKENS, render, waiting_max=2)
    yield made
    words.gate.set()
    made.close()


def ask(tokenizing: Tokenizing, asked: bytes) -> "queue.Queue[Prefix | None]":
    answers: queue.Queue[Prefix | None] = queue.Queue()
    tokenizing.prefix_of(asked, answers.put)
    return answers


def test_prompts_are_tokenized_as_the_engine_does(tokenizing: Tokenizing) -> None:
    """Completions get special tokens, chats only what the template writes, ids stay as they are."""
    expected = {
        body(prompt="a bb ccc dddd"): [1, 1, 2, 3, 4],
        body(messages=[user("a bb ccc dddd")]): [6, 1, 2, 3, 4],
        body(prompt=[5, 6, 7, 8, 9]): [5, 6, 7, 8, 9],
    }
    for asked, ids in expected.items():
        hashes = token_hashes(ids, BLOCK_TOKENS, token_root())

        assert ask(tokenizing, asked).get(timeout=30) == Prefix(hashes, len(ids))


@pytest.mark.parametrize(
    "asked",
    [
        b"{",
        body(prompt=["a", "b"]),
        body(prompt="explode"),
        body(prompt=[-1] * 4),
        body(prompt=[1 << 40] * 4),
        body(prompt=[True, None]),
        body(messages=[{"content": "no role"}]),
    ],
)
def test_what_can_not_be_tokenized_has_no_prefix(tokenizing: Tokenizing, asked: bytes) -> None:
    """Whatever the tokenizer or the template makes of it, the caller is told, and the next goes."""
    assert ask(tokenizing, asked).get(timeout=30) is None
    assert ask(tokenizing, body(prompt="a b c d")).get(timeout=30) is not None


def test_too_many_waiting_prompts_are_not_tokenized(tokenizing: Tokenizing, words: Words) -> None:
    """A prompt that finds no room has no prefix, at once; those that wait get theirs."""
    words.gate.clear()
    waiting = [ask(tokenizing, body(prompt="a b c d")) for _ in range(2)]

    assert ask(tokenizing, body(prompt="a b c d")).get_nowait() is None
    assert tokenizing.num_refused == 1
    words.gate.set()
    assert all(each.get(timeout=30) is not None for each in waiting)


def write_model(folder: Path, template: str) -> None:
    vocabulary = {"[UNK]": 0, "hello": 1, "you": 2, "<user>": 3, "<answer>": 4}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    made = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "WhitespaceSplit"}}
    (folder / "tokenizer.json").write_text(json.dumps(made))
    config = {"chat_template": template, "bos_token": {"content": "hello"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


TEMPLATE = (
    "{{ bos_token }} {% for message in messages %}"
    "{% if message.role != 'user' %}{{ raise_exception('only users') }}{% endif %}"
    "<user> {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)


def test_a_model_folder_is_read(tmp_path: Path) -> None:
    """Tokenizer and chat template come from the model's own files, special tokens included."""
    write_model(tmp_path, TEMPLATE)
    tokenizer, renderer = load_tokenizer(tmp_path)

    assert tokenizer.encode("hello you").ids == [1, 2]
    assert renderer is not None
    assert renderer([user("you")], None).split() == ["hello", "<user>", "you", "<answer>"]
    with pytest.raises(ValueError, match="only users"):
        renderer([{"role": "system", "content": "x"}], None)


def test_parts_are_joined_for_templates_that_know_texts_only(tmp_path: Path) -> None:
    """As vLLM does it; a template that goes through parts gets them as they are."""
    parts = [{"role": "user", "content": [{"type": "text", "text": text} for text in "ab"]}]
    looping = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "<{{ part.text }}>{% endfor %}{% endfor %}{{ {'<': 1} | tojson }}"
    )
    texts = []
    for template in (TEMPLATE, looping):
        write_model(tmp_path, template)
        _, renderer = load_tokenizer(tmp_path)
        assert renderer is not None
        texts.append(renderer(parts, None, add_generation_prompt=False))

    assert texts == ["hello <user> a\nb ", '<a><b>{"<": 1}']


def test_a_template_that_can_not_be_read_is_done_without(tmp_path: Path) -> None:
    """Chats then have no prefix; everything else has."""
    write_model(tmp_path, "{% generation %}")

    assert load_tokenizer(tmp_path)[1] is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model": 1}', "\xff"])
def test_a_broken_tokenizer_is_bad_input(tmp_path: Path, text: str) -> None:
    """A file that is no tokenizer is named."""
    (tmp_path / "tokenizer.json").write_text(text)

    with pytest.raises(InputError, match=r"tokenizer\.json is no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_bad_input(tmp_path: Path) -> None:
    """One sentence says what to give instead."""
    with pytest.raises(InputError, match="give the folder of the model"):
        load_tokenizer(tmp_path)


class ManualClock:
    """Time that a test moves."""

    at_s = 1000.0

    def now_s(self) -> float:
        """What the test says."""
        return self.at_s


async def test_a_view_is_completed_off_the_loop(tokenizing: Tokenizing) -> None:
    """The view has its prefix when its request goes on, on the loop's own thread."""
    prefixes, view = Prefixes(tokenizing, ManualClock()), RequestView("")
    done = asyncio.Event()
    prefixes.fill(body(prompt="a bb ccc dddd"), view, done.set)
    assert not done.is_set()
    await asyncio.wait_for(done.wait(), 30)

    assert view.prefix == token_hashes([1, 1, 2, 3], BLOCK_TOKENS, token_root())
    assert view.num_tokens == 5


async def test_a_prompt_that_takes_too_long_goes_on_without(
    tokenizing: Tokenizing, words: Words
) -> None:
    """At its time limit a request is routed by load, once, whatever the tokenizer says later."""
    words.gate.clear()
    clock = ManualClock()
    prefixes, view = Prefixes(tokenizing, clock), RequestView("", num_tokens=7)
    ended: list[bool] = []
    prefixes.fill(body(prompt="a b c d"), view, lambda: ended.append(True))
    prefixes.look(clock.at_s + WAIT_S / 2)
    was_waiting = not ended
    prefixes.look(clock.at_s + WAIT_S)
    words.gate.set()
    await asyncio.to_thread(tokenizing.close)
    await asyncio.sleep(0)

    assert was_waiting
    assert ended == [True]
    assert (view.prefix, view.num_tokens, prefixes.num_missing) == (None, 7, 1)
