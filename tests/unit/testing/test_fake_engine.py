"""The fake engine: a believable prefix cache, counters and faults."""

import json
from typing import Any

import pytest

from kvkeep.testing.fake_engine import FakeEngine, Timing
from kvkeep.testing.fake_kv import FakeStore, Faults, token_id

WORDS = [f"w{i}" for i in range(70)]


def ask(engine: FakeEngine, text: str = "hello", **more: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 6, **more}
    reply = engine.handle("POST", "/v1/chat/completions", json.dumps(body).encode())
    assert reply.status == 200
    answer: dict[str, Any] = json.loads(reply.body)
    return answer


def said(engine: FakeEngine, text: str, **more: Any) -> str:
    return str(ask(engine, text, **more)["choices"][0]["message"]["content"])


def test_a_prompt_is_computed_then_kept() -> None:
    """The first time nothing is reused, the second time all whole blocks are."""
    engine = FakeEngine()

    assert engine.prefill(WORDS)[1:] == (0, 0)
    assert engine.prefill(WORDS)[1:] == (64, 0)


def test_the_last_token_is_always_computed() -> None:
    """A prompt of whole blocks reuses all but the last one."""
    engine = FakeEngine()
    engine.prefill(WORDS[:64])

    assert engine.prefill(WORDS[:64])[1:] == (48, 0)


def test_a_reset_leaves_the_outside() -> None:
    """After a reset the blocks come from the store, and none from the engine."""
    engine = FakeEngine(store=FakeStore())
    kept = engine.prefill(WORDS)[0]

    engine.handle("POST", "/reset_prefix_cache")

    assert engine.prefill(WORDS) == (kept, 0, 64)


def test_salts_part_requests() -> None:
    """Requests with different salts share nothing, here or outside."""
    engine = FakeEngine(store=FakeStore())
    engine.prefill(WORDS, "one")

    assert engine.prefill(WORDS, "two")[1:] == (0, 0)


def test_a_full_cache_forgets_the_oldest() -> None:
    """A cache of few blocks evicts what was used longest ago."""
    engine = FakeEngine(num_blocks=4)
    engine.prefill(WORDS)
    engine.prefill(list(reversed(WORDS)))

    assert engine.prefill(WORDS)[1:] == (0, 0)


def test_answers_follow_from_the_prompt_not_from_the_way() -> None:
    """Computed, kept and loaded KV give the same answer."""
    store = FakeStore()
    one, two = FakeEngine(store=store), FakeEngine(store=store)
    text = " ".join(WORDS)

    computed = said(one, text)

    assert computed == said(one, text) == said(two, text)
    assert computed != said(one, text + " more")


def test_a_flipped_bit_changes_the_answer() -> None:
    """KV with one wrong bit gives another answer."""
    store = FakeStore()
    right, text = said(FakeEngine(store=store), " ".join(WORDS)), " ".join(WORDS)

    assert said(FakeEngine(store=store, faults=Faults(flip_every=1)), text) != right


def test_a_swapped_block_tells_anothers_code_word() -> None:
    """The engine says the code word its KV holds, whosever it is."""
    store = FakeStore()
    head = "Passage 1. The code word of this passage is {}. " + " ".join(WORDS)
    one, two = head.format("amber-lynx-1111"), head.format("golden-otter-2222")
    engine = FakeEngine(store=store)
    assert "amber-lynx-1111" in said(engine, one)
    said(engine, two)

    assert "golden-otter-2222" in said(FakeEngine(store=store, faults=Faults(swap=True)), one)


def test_counters_count_tokens_like_vllm() -> None:
    """Metrics carry vLLM's names, and hits in tokens."""
    engine = FakeEngine(store=FakeStore())
    engine.prefill(WORDS)
    engine.handle("POST", "/reset_prefix_cache")
    engine.prefill(WORDS)

    text = engine.handle("GET", "/metrics").body.decode()

    assert 'vllm:external_prefix_cache_hits_total{engine="0"} 64.0' in text
    assert 'vllm:prefix_cache_hits_total{engine="0"} 0.0' in text
    assert 'block_size="16"' in text


def test_status_counts_like_a_daemon() -> None:
    """The store's counters stand under ``counters``; an engine alone has none."""
    engine = FakeEngine(store=FakeStore())
    engine.prefill(WORDS)

    assert json.loads(engine.handle("GET", "/status").body)["counters"]["blocks_stored"] == 4
    assert FakeEngine().handle("GET", "/status").status == 404


def test_the_whole_and_the_streamed_form_agree() -> None:
    """A stream's pieces put together are the whole answer."""
    engine = FakeEngine()
    whole = said(engine, "hello there")
    body = {
        "messages": [{"role": "user", "content": "hello there"}],
        "max_tokens": 6,
        "stream": True,
    }

    reply = engine.handle("POST", "/v1/chat/completions", json.dumps(body).encode())

    lines = [line[6:] for line in reply.body.decode().splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == whole


def test_logprobs_are_ranked_and_can_be_ids() -> None:
    """Alternatives come best first, with ids where asked, and the chosen one leads."""
    answer = ask(FakeEngine(), logprobs=True, top_logprobs=3, return_tokens_as_token_ids=True)

    item = answer["choices"][0]["logprobs"]["content"][0]
    top = item["top_logprobs"]
    word = answer["choices"][0]["message"]["content"].split()[0]
    assert len(top) == 3
    assert top == sorted(top, key=lambda entry: -entry["logprob"])
    assert item["token"] == top[0]["token"] == f"token_id:{token_id(word)}"


def test_time_is_spent_on_computed_tokens() -> None:
    """What was reused is not waited for."""
    engine = FakeEngine(timing=Timing(prefill_s_per_token=1.0))
    body = {
        "messages": [{"role": "user", "content": " ".join(WORDS)}],
        "stream": True,
    }

    waits = [
        engine.handle("POST", "/v1/chat/completions", json.dumps(body).encode()).pieces[0][0]
        for _ in range(2)
    ]

    assert waits[0] == 78.0
    assert waits[1] == 78.0 - 64.0


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", b"not json", 400),
        ("/v1/chat/completions", b'{"model": "other", "messages": []}', 404),
        ("/v1/nothing", b"{}", 404),
    ],
)
def test_bad_requests_are_refused(path: str, body: bytes, status: int) -> None:
    """Bad JSON, an unknown model and an unknown path have their status."""
    assert FakeEngine().handle("POST", path, body).status == status


def test_planted_failures_come_when_told() -> None:
    """Each n-th request fails, and a reset lies or refuses, as the faults say."""
    engine = FakeEngine(faults=Faults(fail_every=2, reset_refusals=1, reset_lies=True))
    body = b'{"messages": []}'
    statuses = [engine.handle("POST", "/v1/chat/completions", body).status for _ in range(4)]
    engine.prefill(WORDS)

    assert statuses == [200, 500, 200, 500]
    resets = [json.loads(engine.handle("POST", "/reset_prefix_cache").body) for _ in range(2)]
    assert resets == [{"success": False}, {"success": True}]
    assert engine.prefill(WORDS)[1] == 64
