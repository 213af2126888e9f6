"""Subjects: what cannot be checked is refused before anything is asked of it."""

import json
from typing import Any

import httpx
import pytest

from kvkeep.model.errors import InputError
from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.testing.fake_kv import FakeStore
from kvkeep.testing.fake_transport import fake_transport
from kvkeep.transfer.int8_form import Int8Form
from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.subject import Addresses, open_subject
from kvkeep.validate.subjects.base import Signs


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeEngine]:
    """Fake engines by host name, reached by every client that is made."""
    engines: dict[str, FakeEngine] = {}

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.host not in engines:
            raise httpx.ConnectError("refused", request=request)
        return fake_transport(engines[request.url.host]).handle_request(request)

    class Client(httpx.AsyncClient):
        def __init__(self, **more: Any) -> None:
            super().__init__(**{**more, "transport": httpx.MockTransport(answer)})

    monkeypatch.setattr(httpx, "AsyncClient", Client)
    return engines


async def test_a_whole_stack_is_opened(hosts: dict[str, FakeEngine]) -> None:
    """Engine, second engine, small engine and daemon are probed, and closed at the end."""
    store = FakeStore()
    hosts |= {"a": FakeEngine(store=store), "b": FakeEngine(store=store)}
    hosts["s"] = FakeEngine(store=store, num_blocks=20)
    addresses = Addresses("http://a", "http://a/metrics", "http://b", "http://s")

    async with open_subject(addresses, timeout_s=5, exact=True) as subject:
        assert subject.capabilities.can_be_exact
        assert subject.other is not None
        assert subject.small_capabilities is not None
        assert subject.small_capabilities.num_blocks == 20
        assert subject.daemon is not None
        assert subject.daemon.url == "http://a"


@pytest.mark.parametrize(
    ("addresses", "said"),
    [
        (Addresses("http://nobody"), "No server answers at http://nobody"),
        (Addresses("http://a", model="other"), "does not serve 'other'"),
        (Addresses("http://a", daemon="http://nobody"), "No kvkeep daemon answers"),
        (Addresses("http://a", daemon="http://alone"), "No kvkeep daemon answers"),
        (Addresses("http://a", other="http://nobody"), "No server answers"),
        (Addresses("http://a", small="http://a"), "at most 128 blocks"),
    ],
)
async def test_a_stack_that_cannot_be_checked_is_refused(
    hosts: dict[str, FakeEngine], addresses: Addresses, said: str
) -> None:
    """One sentence says which part is missing or unfit."""
    hosts |= {"a": FakeEngine(store=FakeStore()), "alone": FakeEngine()}

    with pytest.raises(InputError, match=said):
        async with open_subject(addresses, timeout_s=5):
            pytest.fail("opened")


@pytest.mark.parametrize(
    ("page_format", "exact", "is_opened"),
    [
        ("cpu-hnd-vec", True, True),
        (f"cpu-hnd-vec {Int8Form.name}", False, True),
        (f"cpu-hnd-vec {Int8Form.name}", True, False),
        (None, True, True),
    ],
)
async def test_blocks_in_eight_bits_are_not_judged_as_exact(
    hosts: dict[str, FakeEngine], page_format: str | None, exact: bool, is_opened: bool
) -> None:
    """The exact mode names the form that rules it out; else any form is judged by its answers."""

    class Daemon(FakeEngine):
        def _status(self) -> Any:
            reply = super()._status()
            layout = None if page_format is None else {"page_format": page_format}
            status = {**json.loads(reply.body), "pool": {"layout": layout}}
            reply.pieces = [(0.0, json.dumps(status).encode())]
            return reply

    hosts["a"] = Daemon(store=FakeStore())
    opened = open_subject(Addresses("http://a", "http://a"), timeout_s=5, exact=exact)

    if is_opened:
        async with opened:
            return
    with pytest.raises(InputError, match="form int8"):
        await opened.__aenter__()


async def test_an_engine_that_cannot_be_exact_is_refused(hosts: dict[str, FakeEngine]) -> None:
    """The exact mode is refused where the engine's chunks end off its blocks."""

    class Chunked(FakeEngine):
        def _server_info(self):  # type: ignore[no-untyped-def]
            reply = super()._server_info()
            reply.pieces = [(0.0, reply.body.replace(b'tokens": 16', b'tokens": 2048'))]
            return reply

    hosts["a"] = Chunked()

    with pytest.raises(InputError, match="max_num_seqs=1 and max_num_batched_tokens"):
        async with open_subject(Addresses("http://a"), timeout_s=5, exact=True):
            pytest.fail("opened")


class Vllm(FakeEngine):
    """A fake engine that says what vLLM says of itself."""

    transfer: Any = None

    def _models(self) -> Any:
        reply = super()._models()
        reply.pieces = [(0.0, reply.body.replace(b'"id"', b'"owned_by": "vllm", "id"'))]
        return reply

    def _server_info(self) -> Any:
        reply = super()._server_info()
        config = {**json.loads(reply.body)["vllm_config"], "kv_transfer_config": self.transfer}
        reply.pieces = [(0.0, json.dumps({"vllm_config": config}).encode())]
        return reply


async def test_a_subject_is_found_out_by_its_own_words(hosts: dict[str, FakeEngine]) -> None:
    """At an address nobody said anything about, the report has its kind and connectors."""
    engine = Vllm()
    engine.transfer = {"kv_connector": "LMCacheMPConnector"}
    hosts["a"] = engine

    async with open_subject(Addresses("http://a"), timeout_s=5) as subject:
        found = subject.to_dict()

    assert (found["kind"], found["connectors"]) == ("lmcache", ["LMCacheMPConnector"])
    assert found["title"] == "vLLM + LMCache, multi-process"
    assert found["hooks"]["reset"]["address"] == "/reset_prefix_cache"


async def test_a_person_and_a_stack_file_know_better(hosts: dict[str, FakeEngine]) -> None:
    """A named kind wins; a file's signs save the question; other ways hold for the engine alone."""
    hosts |= {"a": Vllm(), "b": Vllm()}
    addresses = Addresses("http://a", other="http://b", signs=Signs("vllm", ("NixlConnector",)))
    settings = CheckSettings(reset="POST http://a/x", external_counters="h", block_tokens=4)

    async with open_subject(addresses, timeout_s=5, settings=settings) as subject:
        assert subject.kind.name == "nixl"
        assert subject.engine.hooks.reset.address == "http://a/x"
        assert subject.other is not None
        assert subject.other.hooks.reset.address == "/reset_prefix_cache"
        assert subject.other.hooks.outside.counters == ("h",)
        assert subject.capabilities.block_tokens == 16
    named = CheckSettings(subject="mooncake")
    async with open_subject(addresses, timeout_s=5, settings=named) as subject:
        assert subject.kind.name == "mooncake"


async def test_an_unknown_server_is_called_by_its_address(hosts: dict[str, FakeEngine]) -> None:
    """It is judged like the others; a block's size that it does not say may be named."""

    class Silent(FakeEngine):
        def _metrics(self) -> Any:
            reply = super()._metrics()
            reply.pieces = [(0.0, b"")]
            return reply

    hosts["a"] = Silent()
    settings = CheckSettings(block_tokens=4)

    async with open_subject(Addresses("http://a"), timeout_s=5, settings=settings) as subject:
        assert (subject.kind.name, subject.title) == ("generic", "http://a")
        assert subject.capabilities.block_tokens == 4
