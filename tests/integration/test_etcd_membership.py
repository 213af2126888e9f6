"""Engines that announce themselves in a real etcd: they come, die, and outlast etcd's own death."""

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import aiohttp
import pytest

from kvkeep.model.clock import SystemClock
from kvkeep.router.membership.etcd import EtcdSettings, EtcdSource
from kvkeep.router.membership.etcd_access import load_access
from kvkeep.router.membership.etcd_client import EtcdClient
from kvkeep.router.membership.member import Member
from kvkeep.router.membership.registration import Registration
from kvkeep.testing.fake_engine import FakeEngine, serve
from tests.servers.etcd import EtcdServer
from tests.servers.processes import free_port
from tests.waiting import until

PREFIX = "/test/engines/"
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def server() -> Iterator[EtcdServer]:
    server = EtcdServer().run()
    yield server
    server.stop()


@pytest.fixture
def mortal() -> Iterator[EtcdServer]:
    """A server of its own for a test that kills it."""
    server = EtcdServer().run()
    yield server
    server.stop()


class Fleet:
    """What a source found, and a way to wait for it."""

    def __init__(self, settings: EtcdSettings) -> None:
        self.source = EtcdSource(settings, SystemClock(), self.take)
        self.names: list[str] | None = None
        self._changed = asyncio.Event()

    def take(self, members: Any) -> None:
        self.names = [member.title for member in members]
        self._changed.set()

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait until something holds; looked at whenever members were found."""
        await until(is_so, timeout_s=PATIENCE_S, changed=self._changed)

    async def until_names(self, *names: str) -> None:
        await self.until(lambda: self.names == list(names))


@contextlib.asynccontextmanager
async def running(coroutine: Any) -> AsyncIterator["asyncio.Task[None]"]:
    """A task that ends with the block."""
    task = asyncio.create_task(coroutine)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def settings_of(server: EtcdServer, **more: Any) -> EtcdSettings:
    values = {"urls": [server.url], "prefix": PREFIX, "timeout_s": 60.0, "resync_s": 3600.0}
    return EtcdSettings(**{**values, **more})


async def post(server: EtcdServer, what: str, request: dict[str, Any]) -> dict[str, Any]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{server.url}/v3/{what}", json=request) as answer,
    ):
        told: dict[str, Any] = await answer.json()
        return told


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


async def put(server: EtcdServer, name: str, value: str) -> dict[str, Any]:
    return await post(server, "kv/put", {"key": b64(PREFIX + name), "value": b64(value)})


@pytest.fixture(autouse=True)
async def empty(server: EtcdServer) -> None:
    """Begin without entries."""
    end = PREFIX[:-1] + "0"
    await post(server, "kv/deleterange", {"key": b64(PREFIX), "range_end": b64(end)})


async def test_engines_join_and_leave_by_their_leases(server: EtcdServer) -> None:
    """One takes its entry back; one just stops renewing it, as a dead one does."""
    settings = settings_of(server)
    fleet = Fleet(settings)
    polite = Registration(settings, Member(url="http://a:1", name="a"), ttl_s=60)
    async with running(fleet.source.run()):
        await fleet.until_names()
        async with running(polite.run()):
            await fleet.until_names("a")
            lease = await post(server, "lease/grant", {"TTL": "6"})
            entry = {"key": b64(PREFIX + "b"), "value": b64('{"url": "http://b:1"}')}
            await post(server, "kv/put", {**entry, "lease": lease["ID"]})
            await fleet.until_names("a", "b")
            await fleet.until_names("a")
        await fleet.until_names()


async def test_an_entry_is_renewed_and_comes_back(server: EtcdServer) -> None:
    """Longer than its lease, and after its lease was revoked under it."""
    settings = settings_of(server)
    fleet = Fleet(settings)
    registration = Registration(settings, Member(url="http://a:1", name="a"), ttl_s=1)
    async with running(fleet.source.run()), running(registration.run()):
        await fleet.until_names("a")
        leases = (await post(server, "kv/lease/leases", {}))["leases"]
        assert len(leases) == 1
        await post(server, "lease/revoke", {"ID": leases[0]["ID"]})
        await fleet.until_names()
        await fleet.until_names("a")


async def test_an_engine_is_announced_while_it_is_well(server: EtcdServer) -> None:
    """The command beside it renews the lease, lets it run out when the engine dies, and tidies."""
    settings = settings_of(server)
    fleet = Fleet(settings)
    port = free_port()
    command = [sys.executable, "-m", "kvkeep", "announce", f"http://127.0.0.1:{port}"]
    options = ["--etcd", server.url, "--prefix", PREFIX, "--name", "e", "--ttl-s", "2"]
    async with running(fleet.source.run()):
        announcing = await asyncio.create_subprocess_exec(
            *command, *options, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        try:
            runner, _ = await serve(FakeEngine(), port=port)
            await fleet.until_names("e")
            assert announcing.stdout is not None
            line = json.loads(await announcing.stdout.readline())
            assert line == {"event": "announced", "key": f"{PREFIX}e"}
            await runner.cleanup()
            await fleet.until_names()
            runner, _ = await serve(FakeEngine(), port=port)
            await fleet.until_names("e")
            announcing.terminate()
            await fleet.until_names()
            await runner.cleanup()
            code = await asyncio.wait_for(announcing.wait(), PATIENCE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                announcing.kill()
            await announcing.wait()

    assert code == 0


async def test_a_compaction_loses_nothing(server: EtcdServer) -> None:
    """Who watches from a revision that is gone reads all anew."""
    fleet = Fleet(settings_of(server, resync_s=0.2))
    async with running(fleet.source.run()):
        await fleet.until_names()
        for number in range(5):
            told = await put(server, "a", f'{{"url": "http://a:{number + 1}"}}')
        await post(server, "kv/compaction", {"revision": told["header"]["revision"]})
        await put(server, "b", '{"url": "http://b:1"}')
        await fleet.until_names("a", "b")
    assert fleet.source.num_outages == 0


async def test_a_watch_from_a_compacted_revision_ends(server: EtcdServer) -> None:
    """Without an error: all that is to be done is to read anew."""
    for number in range(3):
        told = await put(server, "a", f'{{"url": "http://a:{number + 1}"}}')
    await post(server, "kv/compaction", {"revision": told["header"]["revision"]})
    async with aiohttp.ClientSession() as session:
        watch = EtcdClient(session, server.url, 5.0, load_access()).watch(PREFIX, 2)
        found = [entries async for entries in watch]

    assert found == []


async def test_while_etcd_is_away_the_last_known_fleet_stays(mortal: EtcdServer) -> None:
    """And for a while after it is back, even with nothing of what it held."""
    fleet = Fleet(settings_of(mortal, keep_s=8.0, resync_s=0.2))
    await put(mortal, "a", '{"url": "http://a:1"}')
    async with running(fleet.source.run()):
        await fleet.until_names("a")
        mortal.kill()
        await asyncio.wait_for(fleet.source.away.wait(), PATIENCE_S)
        assert fleet.names == ["a"]
        shutil.rmtree(mortal.folder / "data")
        mortal.run()
        await put(mortal, "b", '{"url": "http://b:1"}')
        await fleet.until_names("a", "b")
        await fleet.until_names("b")
    assert fleet.source.num_outages == 1


async def test_a_frozen_etcd_is_noticed_and_costs_nobody(server: EtcdServer) -> None:
    """It answers no question; what was known stays, and counts again when it goes on."""
    fleet = Fleet(settings_of(server, resync_s=0.2, timeout_s=0.5))
    await put(server, "a", '{"url": "http://a:1"}')
    async with running(fleet.source.run()):
        await fleet.until_names("a")
        server.freeze()
        try:
            await asyncio.wait_for(fleet.source.away.wait(), PATIENCE_S)
            assert fleet.names == ["a"]
        finally:
            server.thaw()
        await put(server, "b", '{"url": "http://b:1"}')
        await fleet.until_names("a", "b")


async def test_another_address_is_tried(server: EtcdServer) -> None:
    """Where nobody listens on the first one."""
    fleet = Fleet(settings_of(server, urls=["http://127.0.0.1:1", server.url]))
    await put(server, "a", '{"url": "http://a:1"}')
    async with running(fleet.source.run()):
        await fleet.until_names("a")


async def test_entries_that_are_no_engines_cost_nobody(server: EtcdServer) -> None:
    """They are counted, and the others are found."""
    await put(server, "bad", "nonsense")
    await put(server, "good", '{"url": "http://a:1"}')
    fleet = Fleet(settings_of(server))
    async with running(fleet.source.run()):
        await fleet.until_names("good")
    assert fleet.source.view.num_bad == 1
