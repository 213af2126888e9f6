"""What is handed off, and what is not worth it or not possible."""

import json
from typing import Any

import pytest

from kvkeep.router.handoff.plan import (
    Facts,
    ParamsGuard,
    PlanError,
    estimate_tokens,
    refuse_params,
    why_not_possible,
    why_not_worth,
)
from kvkeep.router.handoff.settings import HandOffSettings
from kvkeep.router.handoff.splice import JsonObject

SETTINGS = HandOffSettings(min_tokens=100)


def body_of(**fields: Any) -> JsonObject:
    return JsonObject(json.dumps({"prompt": "p", **fields}).encode())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, ""),
        ({"prompt": ["one"], "n": 1, "echo": False, "prompt_logprobs": None}, ""),
        ({"prompt": [1, 2, 3], "best_of": None, "use_beam_search": False}, ""),
        ({"prompt": ["one", "two"]}, "batch"),
        ({"prompt": [[1], [2]]}, "batch"),
        ({"prompt_embeds": "AAAA"}, "batch"),
        ({"n": 2}, "samples"),
        ({"n": "2"}, "samples"),
        ({"best_of": 3}, "samples"),
        ({"use_beam_search": 1}, "samples"),
        ({"echo": True}, "prompt"),
        ({"echo": "true"}, "prompt"),
        ({"prompt_logprobs": 0}, "prompt"),
        ({"kv_transfer_params": None}, ""),
    ],
)
def test_one_prompt_and_one_answer_can_be_handed_off(fields: dict[str, Any], reason: str) -> None:
    """Anything that vLLM would read as more than that is not."""
    assert why_not_possible(body_of(**fields), SETTINGS) == reason


def test_a_number_beyond_all_numbers_is_not_one() -> None:
    """What no type holds is not taken for 1."""
    assert why_not_possible(JsonObject(b'{"n": 1e999}'), SETTINGS) == "samples"


def test_parameters_of_a_client_are_refused_unless_allowed() -> None:
    """Also empty ones: an engine would do something with them."""
    told = body_of(kv_transfer_params={})
    allowing = HandOffSettings(client_params="decode_alone")

    with pytest.raises(PlanError, match="leave it out"):
        why_not_possible(told, SETTINGS)
    assert why_not_possible(told, allowing) == "client_params"


@pytest.mark.parametrize(
    ("num_tokens", "num_uncached", "reason"),
    [(99, 99, "short"), (100, 100, ""), (5000, 99, "warm"), (5000, 100, ""), (0, 0, "short")],
)
def test_little_work_is_not_worth_a_hand_off(
    num_tokens: int, num_uncached: int, reason: str
) -> None:
    """Short prompts, and those of which a decode engine has nearly all."""
    assert why_not_worth(Facts(num_tokens, num_uncached), SETTINGS) == reason


def test_without_a_minimum_everything_is_handed_off() -> None:
    """Also the shortest prompt."""
    assert why_not_worth(Facts(0, 0), HandOffSettings(min_tokens=0)) == ""


@pytest.mark.parametrize(
    ("fields", "num_tokens"),
    [
        ({"prompt": "word " * 400}, 500),
        ({"prompt": [7] * 300}, 300),
        ({"prompt": [[7] * 300]}, 300),
        ({"prompt": None, "messages": []}, 0),
    ],
)
def test_tokens_are_estimated_by_the_prompt_alone(fields: dict[str, Any], num_tokens: int) -> None:
    """Of ids exactly, of text roughly; other fields don't count."""
    found = estimate_tokens(body_of(logit_bias=dict.fromkeys(map(str, range(999)), 1), **fields))

    assert found == pytest.approx(num_tokens, abs=2)


def test_a_chat_is_estimated_by_its_messages() -> None:
    """Without what JSON adds to each."""
    messages = [{"role": "user", "content": "word " * 40}] * 10
    chat = JsonObject(json.dumps({"messages": messages}).encode())

    assert 450 <= estimate_tokens(chat) <= 600


NAMED = '{"a": [{"kv_transfer_params": {"remote_host": "10.0.0.9"}}]}'
NAMING = [
    NAMED.encode(),
    NAMED.encode("utf-16"),
    NAMED.encode("utf-32-le"),
    NAMED.replace("kv", "\\u006B\\u0076").replace("_", "\\u005f").encode(),
    b'{"x": NaN, "kv_transfer_params": {}}',
    b'{"kv_transfer_params": {}',
]


def _take_in_pieces(body: bytes, size: int) -> None:
    guard = ParamsGuard()
    for at in range(0, len(body), size):
        guard.take(body[at : at + size])


@pytest.mark.parametrize("body", NAMING)
def test_parameters_are_found_however_they_are_spelt(body: bytes) -> None:
    """At any depth, in any encoding that engines' parsers know, and in what this one can't read."""
    with pytest.raises(PlanError, match="leave it out"):
        refuse_params(body)
    for size in (1, 7, len(body)):
        with pytest.raises(PlanError, match="leave it out"):
            _take_in_pieces(body, size)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe\x00 no text",
        b'{"prompt": "what is \\"kv_transfer_params\\": {} for?"}',
        b'{"kv_transfer_params": null}',
        b'{"prompt": "\\u006b\\u0065y"}',
    ],
)
def test_a_text_about_parameters_names_none(body: bytes) -> None:
    """Nor does what sets nothing."""
    refuse_params(body)
