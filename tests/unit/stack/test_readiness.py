"""When a daemon and an engine count as ready."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from kvkeep.model.errors import UnavailableError
from kvkeep.stack.readiness import Ready, complete_one_token, find_ready_line, is_healthy

LINE = json.dumps({"event": "ready", "socket": "/s", "metrics_port": 9, "pool": "/p", "pid": 1})
READY = Ready(socket="/s", metrics_port=9, pool="/p")


@pytest.mark.parametrize(
    ("output", "ready"),
    [
        ("", None),
        ("INFO opening\n" + LINE + "\nINFO serving\n", READY),
        (LINE[:30], None),
        ('{"event": "ready"}\n', None),
        ('{"ready": 1}\n[1, "ready"]\n', None),
    ],
)
def test_a_daemon_is_ready_when_it_says_so(output: str, ready: Ready | None) -> None:
    """Only the whole announcement counts."""
    assert find_ready_line(output.encode()) == ready


def client(answer: Callable[[httpx.Request], httpx.Response]) -> httpx.Client:
    return httpx.Client(transport=httpx.MockTransport(answer))


def completion(body: Any, code: int = 200) -> Callable[[httpx.Request], httpx.Response]:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "first"}]})
        assert json.loads(request.content)["max_tokens"] == 1
        return httpx.Response(code, json=body)

    return answer


GOOD = {"choices": [{"text": "x", "finish_reason": "length"}]}


def test_an_engine_is_ready_when_it_gave_a_token() -> None:
    """One token of one completion is proof."""
    with client(completion(GOOD)) as http:
        complete_one_token(http, "http://e", "m")


def test_a_running_engine_is_asked_for_what_it_serves() -> None:
    """Where no model is named, the first served one is used."""
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            seen.append(json.loads(request.content)["model"])
        return completion(GOOD)(request)

    with client(answer) as http:
        complete_one_token(http, "http://e", None)

    assert seen == ["first"]


@pytest.mark.parametrize(
    ("body", "code", "sentence"),
    [
        ({"error": "no such model"}, 404, "http://e refused a completion"),
        ({"choices": []}, 200, "http://e answered without a token"),
        ({"choices": [{"text": "", "finish_reason": None}]}, 200, "answered without a token"),
        ([], 200, "answered without a token"),
    ],
)
def test_an_answer_without_a_token_is_no_proof(body: Any, code: int, sentence: str) -> None:
    """An engine that answers but computes nothing is not ready."""
    with client(completion(body, code)) as http, pytest.raises(UnavailableError, match=sentence):
        complete_one_token(http, "http://e", "m")


def test_no_answer_is_no_proof() -> None:
    """A connection that breaks is a sentence, not a traceback of a library."""

    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with client(answer) as http:
        assert not is_healthy(http, "http://e")
        with pytest.raises(UnavailableError, match="http://e gave no completion"):
            complete_one_token(http, "http://e", "m")


@pytest.mark.parametrize(("code", "healthy"), [(200, True), (503, False)])
def test_health_is_a_status(code: int, healthy: bool) -> None:
    """An engine that is still loading is not healthy."""
    with client(lambda request: httpx.Response(code)) as http:
        assert is_healthy(http, "http://e") is healthy
