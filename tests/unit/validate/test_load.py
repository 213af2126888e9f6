"""Requests: what came back is kept, and whatever goes wrong becomes part of the answer."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.validate import load
from kvkeep.validate.load import Dialect, Endpoint, Sampling
from kvkeep.validate.subjects.hooks import Hooks, Reset
from kvkeep.validate.verdict import defect_of

Handler = Callable[[httpx.Request], httpx.Response]


def endpoint(handler: Handler, **more: Any) -> Endpoint:
    return Endpoint("http://engine:1/v1/", transport=httpx.MockTransport(handler), **more)


def stream(*chunks: object, done: bool = True) -> Handler:
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    if done:
        body += "data: [DONE]\n\n"
    return lambda request: httpx.Response(
        200, content=body, headers={"content-type": "text/event-stream"}
    )


def chunk(text: str, token: int, finish: str | None = None) -> dict[str, Any]:
    top = [{"token": f"token_id:{token + i}", "logprob": -0.5 - i} for i in range(2)]
    logprobs = {"content": [{**top[0], "top_logprobs": top}]}
    choice = {"delta": {"content": text}, "logprobs": logprobs, "finish_reason": finish}
    return {"choices": [choice]}


async def test_an_answer_is_put_together() -> None:
    """Text, tokens, alternatives, prompt ids, usage and times of a stream are all kept."""
    usage = {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
    first = {**chunk("Hel", 7), "prompt_token_ids": [1, 2, 3]}
    async with endpoint(
        stream(first, chunk("lo", 9, "stop"), {"choices": [], "usage": usage})
    ) as engine:
        answer = await engine.chat("hi", Sampling())

    assert (answer.text, answer.token_ids) == ("Hello", ("token_id:7", "token_id:9"))
    assert answer.steps[0].runner_up == ("token_id:8", -1.5)
    assert answer.prompt_token_ids == (1, 2, 3)
    assert (answer.prompt_tokens, answer.cached_tokens) == (3, 2)
    assert (answer.finish_reason, answer.error) == ("stop", None)
    assert answer.ttft_s is not None
    assert answer.total_s is not None
    assert answer.ttft_s <= answer.total_s


async def test_the_request_says_what_is_needed() -> None:
    """A request is greedy, seeded, streamed, salted and asks for token ids."""
    seen: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content))
        return stream(chunk("x", 1, "length"))(request)

    async with endpoint(answer, model="m") as engine:
        await engine.chat("hi", Sampling(max_tokens=5, seed=6), salt="s")

    body = seen[0]
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0, 6, 5)
    assert (body["model"], body["cache_salt"], body["stream"]) == ("m", "s", True)
    assert body["return_tokens_as_token_ids"] is True
    assert body["logprobs"] is True


async def test_a_plain_server_is_asked_plainly() -> None:
    """A server that knows no extras is sent none."""
    seen: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content))
        return stream(chunk("x", 1, "length"))(request)

    plain = Dialect(logprobs=False, token_ids=False, cache_salt=False, usage_in_stream=False)
    async with endpoint(answer, dialect=plain) as engine:
        await engine.chat("hi", Sampling(), salt="s")

    extras = {"logprobs", "cache_salt", "return_token_ids", "stream_options"}
    assert not extras & seen[0].keys()


async def _refuse(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused", request=request)


@pytest.mark.parametrize(
    ("handler", "said"),
    [
        (stream(), "finish reason"),
        (stream(chunk("half", 1), done=False), "broke off"),
        (stream({"error": {"message": "out of memory"}}), "out of memory"),
        (stream("not a mapping"), "can't be read"),
        (stream(chunk("", 1, "stop")), "empty"),
        (lambda _: httpx.Response(500, text="boom"), "HTTP 500: boom"),
        (_refuse, "ConnectError"),
    ],
    ids=["only-done", "cut", "error-chunk", "malformed", "empty", "500", "refused"],
)
async def test_a_failed_request_is_a_failed_answer(handler: Any, said: str) -> None:
    """Whatever the server does wrong is said in the answer, and nothing is raised."""
    async with endpoint(handler) as engine:
        answer = await engine.chat("hi", Sampling())

    assert said in (defect_of(answer) or "")


async def test_a_reset_is_tried_until_it_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reset refused while stores are in flight is asked again, and the report says how often."""
    monkeypatch.setattr(load, "RESET_PAUSE_S", 0.0)
    refusals = iter([False, False, True])
    async with endpoint(lambda _: httpx.Response(200, json={"success": next(refusals)})) as engine:
        report = await engine.reset_prefix_cache()

    assert (report.ok, report.attempts) == (True, 3)
    assert report.cleared["engine"] == "all blocks"


async def test_a_reset_that_never_succeeds_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of attempts is bounded, and the report says that nothing was cleared."""
    monkeypatch.setattr(load, "RESET_PAUSE_S", 0.0)
    async with endpoint(lambda _: httpx.Response(200, json={"success": False})) as engine:
        report = await engine.reset_prefix_cache()

    assert (report.ok, report.attempts) == (False, load.RESET_ATTEMPTS_MAX)
    assert report.cleared["engine"] == "nothing"


async def test_a_server_without_reset_is_told_apart() -> None:
    """A missing endpoint is not asked again, and the report says how to get it."""
    async with endpoint(lambda _: httpx.Response(404)) as engine:
        report = await engine.reset_prefix_cache()

    assert (report.ok, report.attempts) == (False, 1)
    assert "VLLM_SERVER_DEV_MODE=1" in report.detail


@pytest.mark.parametrize(
    ("address", "url"),
    [("/flush?all=no", "http://engine:1/flush?all=no"), ("http://cache/x", "http://cache/x")],
)
async def test_a_reset_of_ones_own_is_asked_for(address: str, url: str) -> None:
    """Another method and path, at the engine or elsewhere; any success counts."""
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((request.method, str(request.url)))
        return httpx.Response(204)

    async with endpoint(answer) as engine:
        engine.hooks = Hooks(reset=Reset("DELETE", address))
        report = await engine.reset_prefix_cache()

    assert report.ok
    assert seen == [("DELETE", url)]


async def test_a_server_that_has_no_reset_is_not_asked() -> None:
    """The report says what could be done, and nothing is sent."""
    async with endpoint(_refuse) as engine:  # type: ignore[arg-type]
        engine.hooks = Hooks(reset=Reset(address="", otherwise="name one with --reset"))
        report = await engine.reset_prefix_cache()

    assert (report.ok, report.attempts, report.detail) == (False, 1, "name one with --reset.")


async def test_a_reset_with_an_empty_answer_is_believed_for_now() -> None:
    """Older servers answer nothing; whether it is true shows in the replay's counters."""
    async with endpoint(lambda _: httpx.Response(200)) as engine:
        assert (await engine.reset_prefix_cache()).ok


async def test_pages_that_fail_raise() -> None:
    """A page that is missing or is no JSON is unavailable, not empty."""
    async with endpoint(lambda _: httpx.Response(404)) as engine:
        with pytest.raises(UnavailableError, match="/metrics"):
            await engine.get_text("/metrics")
    async with endpoint(lambda _: httpx.Response(200, text="<html>")) as engine:
        with pytest.raises(UnavailableError, match="JSON"):
            await engine.get_json("/status")


async def test_addresses_are_checked() -> None:
    """An address may lack its scheme or end in /v1; something else is refused."""
    async with Endpoint("127.0.0.1:8000") as engine:
        assert engine.url == "http://127.0.0.1:8000"
    async with Endpoint("http://127.0.0.1:8000/v1/") as engine:
        assert engine.url == "http://127.0.0.1:8000"
    with pytest.raises(InputError, match="address"):
        Endpoint("file:///etc/hosts")


def test_an_answer_has_at_least_one_token() -> None:
    """A length below one is refused."""
    with pytest.raises(InputError, match="max-tokens"):
        Sampling(max_tokens=0)
