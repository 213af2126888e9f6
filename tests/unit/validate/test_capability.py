"""Capabilities: a server is asked what it is, in the richest form it understands."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from kvkeep.model.errors import InputError
from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.testing.fake_kv import FakeStore
from kvkeep.testing.fake_transport import fake_transport
from kvkeep.validate.capability import probe
from kvkeep.validate.load import Dialect, Endpoint, Sampling
from kvkeep.validate.subjects.hooks import Hooks, Outside

Connect = Callable[..., Endpoint]


async def test_a_full_engine_is_described(connect: Connect) -> None:
    """Model, length, block size and number, and counters are found by asking."""
    engine = connect(FakeEngine(store=FakeStore(), block_tokens=32, num_blocks=20))

    found = await probe(engine, read_settings=True)

    assert (found.model, engine.model, found.max_model_len) == ("fake-model",) * 2 + (8192,)
    assert (found.block_tokens, found.num_blocks) == (32, 20)
    assert found.dialect == Dialect()
    assert found.reports_prompt_ids
    assert found.reports_cached_tokens
    assert found.can_be_exact


async def test_settings_that_were_not_read_are_unknown(connect: Connect) -> None:
    """Without the scheduler's settings nothing is claimed about the exact mode."""
    found = await probe(connect(FakeEngine()))

    assert found.can_be_exact is None


async def test_a_first_answer_is_waited_for_longer() -> None:
    """What an engine left undone at its start is done then; later answers have their usual time."""
    fake, waits = FakeEngine(), []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/chat/completions":
            waits.append(request.extensions["timeout"]["read"])
        return fake_transport(fake).handle_request(request)

    async with Endpoint(
        "http://fake", timeout_s=10.0, transport=httpx.MockTransport(answer)
    ) as endpoint:
        await probe(endpoint)
        await endpoint.chat("Hi.", Sampling(1))

    assert waits == [40.0, 10.0]


async def test_chunks_larger_than_a_block_cannot_be_exact() -> None:
    """An engine whose chunks end elsewhere than its hits can't promise equal bits."""
    fake = FakeEngine(block_tokens=32)

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/server_info":
            scheduler = {"max_num_batched_tokens": 2048, "max_num_seqs": 1}
            return httpx.Response(200, json={"vllm_config": {"scheduler_config": scheduler}})
        return fake_transport(fake).handle_request(request)

    async with Endpoint("http://fake", transport=httpx.MockTransport(answer)) as engine:
        found = await probe(engine, read_settings=True)

    assert found.max_num_batched_tokens == 2048
    assert found.can_be_exact is False


async def test_a_plain_server_is_found_out() -> None:
    """A server that refuses extras is asked with fewer, until it answers."""
    fake = FakeEngine()
    strange = {"return_token_ids", "return_tokens_as_token_ids", "cache_salt", "logprobs"}

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST" and strange & json.loads(request.content).keys():
            return httpx.Response(400, json={"error": {"message": "unknown field"}})
        return fake_transport(fake).handle_request(request)

    async with Endpoint("http://fake", transport=httpx.MockTransport(answer)) as engine:
        found = await probe(engine)

    assert found.dialect == Dialect(logprobs=False, token_ids=False, cache_salt=False)
    assert not found.reports_prompt_ids


async def test_a_server_that_ignores_extras_is_found_out() -> None:
    """What counts is what comes back, not that the request was accepted."""
    fake = FakeEngine()

    def answer(request: httpx.Request) -> httpx.Response:
        body = request.content
        if request.method == "POST":
            asked = json.loads(body)
            for extra in ("logprobs", "return_token_ids", "return_tokens_as_token_ids"):
                asked.pop(extra, None)
            body = json.dumps(asked).encode()
        reply = fake.handle(request.method, request.url.path, body)
        return httpx.Response(reply.status, content=reply.body)

    async with Endpoint("http://fake", transport=httpx.MockTransport(answer)) as engine:
        found = await probe(engine)

    assert (found.dialect.logprobs, found.dialect.token_ids) == (False, False)


async def _broken(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused", request=request)


def _models(*names: str) -> Callable[[httpx.Request], httpx.Response]:
    data = [{"id": name} for name in names]
    return lambda _: httpx.Response(200, json={"data": data})


@pytest.mark.parametrize(
    ("handler", "said"),
    [
        (_broken, "No server answers"),
        (_models(), "serves no model"),
        (_models("other", "third"), "other, third"),
    ],
)
async def test_a_server_that_cannot_be_checked_is_refused(handler: Any, said: str) -> None:
    """Nothing there, no model, or another model: one sentence says which."""
    transport = httpx.MockTransport(handler)
    async with Endpoint("http://fake", model="asked", transport=transport) as engine:
        with pytest.raises(InputError, match=said):
            await probe(engine)


async def test_a_server_that_answers_no_chat_is_refused(connect: Connect) -> None:
    """A server whose every completion fails can't be checked."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return fake_transport(FakeEngine()).handle_request(request)
        return httpx.Response(500, text="no template")

    async with Endpoint("http://fake", transport=httpx.MockTransport(answer)) as engine:
        with pytest.raises(InputError, match="no template"):
            await probe(engine)


async def test_metrics_of_another_kind_are_no_counters() -> None:
    """TensorRT-LLM has JSON there: nothing is known of its blocks and hits, and nothing breaks."""
    fake = FakeEngine()

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            return httpx.Response(200, json=[{"iter": 1, "kvCacheStats": {"reusedBlocks": 3}}])
        return fake_transport(fake).handle_request(request)

    async with Endpoint("http://fake", transport=httpx.MockTransport(answer)) as engine:
        found = await probe(engine)

    assert (found.block_tokens, found.has_local_counters) == (None, False)


async def test_counters_that_were_named_must_be_there() -> None:
    """An address that nobody answers at is bad input, told before anything is asked."""
    fake = FakeEngine()

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.host != "fake":
            return httpx.Response(404)
        return fake_transport(fake).handle_request(request)

    async with Endpoint("http://fake", transport=httpx.MockTransport(answer)) as engine:
        engine.hooks = Hooks(outside=Outside(("hits",), "http://nobody/metrics"))
        with pytest.raises(InputError, match="look at --external-metrics"):
            await probe(engine)
