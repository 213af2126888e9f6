"""Subjects are told by their stack file, or by what they say over HTTP."""

from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from kvkeep.stack.spec import EngineSpec
from kvkeep.validate.load import Endpoint
from kvkeep.validate.subjects.base import Signs
from kvkeep.validate.subjects.signs import connectors_in, look, signs_in_file

INSIDE = {
    "kv_connector": "MultiConnector",
    "kv_connector_extra_config": {
        "connectors": [{"kv_connector": "NixlConnector"}, {"kv_connector": "KvkeepConnector"}]
    },
}
ALL_INSIDE = ("MultiConnector", "NixlConnector", "KvkeepConnector")


@pytest.mark.parametrize(
    ("connector", "names"),
    [
        ("kvkeep", ("KvkeepConnector",)),
        ("nixl", ("NixlConnector",)),
        ("none", ()),
        ({"kv_connector": "LMCacheMPConnector"}, ("LMCacheMPConnector",)),
        (INSIDE, ALL_INSIDE),
    ],
)
def test_a_stack_file_says_which_connectors(connector: Any, names: tuple[str, ...]) -> None:
    """Words of the file and whole configurations, with those inside a MultiConnector."""
    assert signs_in_file(EngineSpec(name="a", connector=connector)) == Signs("vllm", names)


def test_an_engine_that_runs_already_has_to_be_asked() -> None:
    """Its address says nothing of its connector; another program is told by its field."""
    assert signs_in_file(EngineSpec(name="a", url="http://h:1")) is None
    trtllm = EngineSpec(name="a", server="trtllm", connector="none")
    assert signs_in_file(trtllm) == Signs("trtllm", ())


def server(pages: Mapping[str, Any], asked: list[str] | None = None) -> Endpoint:
    """A server with these pages and no others; ``asked`` gets the paths."""

    def answer(request: httpx.Request) -> httpx.Response:
        if asked is not None:
            asked.append(request.url.path)
        if request.url.path not in pages:
            return httpx.Response(404)
        return httpx.Response(200, json=pages[request.url.path])

    return Endpoint("http://h", transport=httpx.MockTransport(answer))


def models(owner: str) -> dict[str, Any]:
    return {"data": [{"id": "m", "owned_by": owner}]}


@pytest.mark.parametrize(
    ("transfer", "names"),
    [(None, ()), ({"kv_connector": "OffloadingConnector"}, ("OffloadingConnector",))],
)
async def test_vllm_tells_its_connector(transfer: Any, names: tuple[str, ...]) -> None:
    """With developer endpoints open, its whole configuration can be read."""
    info = {"vllm_config": {"kv_transfer_config": transfer}}
    pages = {"/version": {"version": "0.32.0"}, "/v1/models": models("vllm"), "/server_info": info}

    async with server(pages) as endpoint:
        assert await look(endpoint) == Signs("vllm", names, "0.32.0")


async def test_vllm_with_closed_endpoints_keeps_its_connector_to_itself() -> None:
    """What is not said is unknown, not absent."""
    async with server({"/v1/models": models("vllm")}) as endpoint:
        assert await look(endpoint) == Signs("vllm", None)
    assert connectors_in({"vllm_config": "one long text"}) is None


async def test_tensorrt_llm_is_told_by_the_owner_of_its_models() -> None:
    """Its /server_info is about something else, and is not asked for."""
    pages = {"/v1/models": models("tensorrt_llm"), "/version": {"version": "1.2"}}
    asked: list[str] = []

    async with server(pages, asked) as endpoint:
        assert await look(endpoint) == Signs("trtllm", None, "1.2")
    assert "/server_info" not in asked


async def test_a_stack_file_saves_the_long_question() -> None:
    """An engine takes seconds to describe itself, so only its version is asked for."""
    told, asked = Signs("vllm", ("NixlConnector",)), list[str]()

    async with server({"/version": {"version": "0.32.0"}}, asked) as endpoint:
        assert await look(endpoint, told) == Signs("vllm", ("NixlConnector",), "0.32.0")
    assert asked == ["/version"]


@pytest.mark.parametrize("page", ["text", [], {"data": []}, {"data": [3]}, {"version": 3}])
async def test_strange_answers_are_unknown(page: Any) -> None:
    """Whatever a server says, nothing breaks."""
    pages = {"/v1/models": page, "/version": page}

    async with server(pages) as endpoint:
        assert await look(endpoint) == Signs()
