"""The router's own port: who is in the fleet, why a request goes where it goes, and who may ask."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client.parser import text_string_to_metric_families

from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import InputError
from kvkeep.router.admin import find_key, make_application
from kvkeep.router.metrics import COUNTERS, GAUGES, RouterMetrics
from kvkeep.router.run import Parts
from kvkeep.router.settings import load_settings
from kvkeep.router.snapshot import EndpointState

SECRET = "admin-0123456789abcdef"
Client = TestClient[Any, Any]


def parts_of(**more: object) -> Parts:
    engines = ["http://127.0.0.1:1", {"url": "http://127.0.0.1:2", "name": "two"}]
    return Parts(load_settings(None, {}, {"engines": engines, **more}), SystemClock())


async def opened(parts: Parts, key: bytes | None = None) -> Client:
    client: Client = TestClient(TestServer(make_application(parts, RouterMetrics(parts), key)))
    await client.start_server()
    return client


@pytest.fixture
def parts() -> Parts:
    parts = parts_of()
    for endpoint in parts.fleet:
        endpoint.state = EndpointState.READY
    parts.fleet.changed()
    return parts


@pytest.fixture
async def client(parts: Parts) -> AsyncIterator[Client]:
    client = await opened(parts)
    yield client
    await client.close()


async def names(client: Client) -> dict[str, str]:
    told = await (await client.get("/workers")).json()
    return {worker["name"]: worker["state"] for worker in told["workers"]}


async def test_health_and_readiness_are_two_things(client: Client, parts: Parts) -> None:
    """A router without a ready engine lives, and is no use to a load balancer."""
    assert (await client.get("/ready")).status == 200
    for endpoint in parts.fleet:
        endpoint.state = EndpointState.DOWN
    parts.fleet.changed()

    assert (await client.get("/health")).status == 200
    assert (await client.get("/ready")).status == 503


async def test_a_draining_router_is_not_ready(client: Client, parts: Parts) -> None:
    """Load balancers take it out before it goes."""
    parts.relay.drain()
    answer = await client.get("/ready")

    assert (answer.status, (await answer.json())["status"]) == (503, "draining")


async def test_engines_join_and_leave_over_the_api(client: Client) -> None:
    """Twice is once, both ways."""
    new = {"url": "http://127.0.0.1:3", "name": "three", "role": "decode"}
    joined = [(await client.post("/workers", json=new)).status for _ in range(2)]
    assert (joined, (await names(client))["three"]) == ([201, 200], "joining")
    left = [(await client.delete("/workers/three")).status for _ in range(2)]

    assert left == [200, 200]
    assert "three" not in await names(client)


async def test_an_engine_that_leaves_with_requests_drains(client: Client, parts: Parts) -> None:
    """The answer says that it is still there."""
    endpoint = parts.fleet.find("two")
    assert endpoint is not None
    endpoint.num_in_flight = 1
    answer = await client.delete("/workers/two")

    assert (answer.status, (await answer.json())["state"]) == (202, "draining")


async def test_an_engine_is_drained_and_put_back(client: Client) -> None:
    """It stays in the fleet."""
    drained = await client.patch("/workers/two", json={"drain": True})
    assert (await drained.json())["state"] == "draining"
    back = await client.patch("/workers/two", json={"drain": False})

    assert (await back.json())["is_drained"] is False
    assert (await client.patch("/workers/none", json={"drain": True})).status == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/workers", "", 400),
        ("POST", "/workers", "[]", 400),
        ("POST", "/workers", '{"url": "ftp://x"}', 400),
        ("POST", "/workers", '{"url": "http://x", "more": 1}', 400),
        ("POST", "/workers", '{"url": "http://127.0.0.1:1", "name": "other"}', 409),
        ("PATCH", "/workers/two", '{"drain": 1}', 400),
        ("PUT", "/workers/two", "", 405),
        ("GET", "/nothing", "", 404),
        ("POST", "/explain?path=/v1/x%20y", "{}", 400),
        ("POST", "/explain?path=/v1/x%0d%0aHost:%20y", "{}", 400),
    ],
)
async def test_what_is_wrong_is_told_and_changes_nothing(
    client: Client, method: str, path: str, body: str, status: int
) -> None:
    """As JSON in the form of OpenAI's errors."""
    before = await names(client)
    answer = await client.request(method, path, data=body)

    assert answer.status == status
    assert (await answer.json())["error"]["message"]
    assert await names(client) == before


async def test_a_choice_is_explained_and_nothing_is_sent(client: Client, parts: Parts) -> None:
    """Which endpoint, by which policy and why; no request is counted anywhere."""
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    answer = await client.post("/explain", json=body)
    told = await answer.json()

    assert answer.status == 200
    assert told["endpoint"] in ("127.0.0.1:1", "two")
    assert (told["policy"], len(told["considered"])) == ("round_robin", 2)
    assert [endpoint.num_in_flight for endpoint in parts.fleet] == [0, 0]


async def test_an_explanation_looks_at_what_a_request_would_show() -> None:
    """The same session header, the same endpoint; and the key is named."""
    parts = parts_of(policy="consistent_hash")
    for endpoint in parts.fleet:
        endpoint.state = EndpointState.READY
    parts.fleet.changed()
    client = await opened(parts)
    found = []
    for _ in range(4):
        answer = await client.post("/explain", json={}, headers={"X-Session-Id": "s-1"})
        found.append(await answer.json())
    await client.close()

    assert {told["key"] for told in found} == {"s-1"}
    assert len({told["endpoint"] for told in found}) == 1


async def test_prometheus_is_told_every_number(client: Client) -> None:
    """Of the tables, and of each endpoint."""
    text = await (await client.get("/metrics")).text()
    families = {family.name for family in text_string_to_metric_families(text)}

    assert {f"kvkeep_router_{name}" for name in (*COUNTERS, *GAUGES)} <= families
    assert 'kvkeep_router_endpoint_requests_done_total{endpoint="two"} 0.0' in text
    assert 'kvkeep_router_refused_total{code="queue_full"} 0.0' in text


async def test_settings_are_shown_without_secrets(tmp_path: Path) -> None:
    """Keys lie in files; a password in an address is blanked out."""
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"- {{name: a, key: {SECRET}}}")
    keys.chmod(0o600)
    parts = parts_of(
        limits={"keys_file": str(keys)}, etcd={"urls": [f"http://me:{SECRET}@127.0.0.1:2379"]}
    )
    client = await opened(parts)
    told = await (await client.get("/config")).json()
    await client.close()

    assert SECRET not in json.dumps(told)
    assert told["limits"]["keys_file"] == str(keys)
    assert told["etcd"]["urls"] == ["http://***@127.0.0.1:2379"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:80"},
        {"Host": "127.0.0.1.evil.example"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
    ],
)
async def test_web_pages_do_not_reach_it(client: Client, headers: dict[str, str]) -> None:
    """A page in a browser on this machine can make it send requests here, by two ways."""
    answer = await client.post("/workers", json={"url": "http://127.0.0.1:9"}, headers=headers)

    assert answer.status == 403
    assert len(await names(client)) == 2


async def test_with_a_key_all_but_health_needs_it(parts: Parts) -> None:
    """Metrics too: they tell who asks how much."""
    client = await opened(parts, SECRET.encode())
    shown = {"Authorization": f"Bearer {SECRET}"}
    wrong = {"Authorization": f"Bearer {SECRET}x"}
    found = {
        path: [(await client.get(path, headers=headers)).status for headers in ({}, wrong, shown)]
        for path in ("/health", "/ready", "/metrics", "/workers", "/config", "/nothing")
    }
    await client.close()

    assert found == {
        "/health": [200, 200, 200],
        "/ready": [200, 200, 200],
        "/metrics": [401, 401, 200],
        "/workers": [401, 401, 200],
        "/config": [401, 401, 200],
        "/nothing": [401, 401, 404],
    }


def test_other_machines_need_a_key(tmp_path: Path) -> None:
    """Without one the router does not start."""
    key = tmp_path / "key"
    key.write_text(f"{SECRET}\n")
    key.chmod(0o600)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.com"):
        with pytest.raises(InputError, match="admin_key_file"):
            find_key(host, "")

    assert find_key("0.0.0.0", str(key)) == SECRET.encode()
    assert [find_key(host, "") for host in ("127.0.0.1", "::1", "localhost")] == [None] * 3


@pytest.mark.parametrize(
    ("text", "mode"), [("short", 0o600), ("two words long", 0o600), (SECRET, 0o644)]
)
def test_a_weak_key_is_refused(tmp_path: Path, text: str, mode: int) -> None:
    """One that can be guessed, or that others can read."""
    key = tmp_path / "key"
    key.write_text(text)
    key.chmod(mode)

    with pytest.raises(InputError):
        find_key("127.0.0.1", str(key))
