"""Probes of real servers: well, ill, frozen, gone, and such as answer nonsense."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest
from aiohttp import web

from kvkeep.model.clock import SystemClock
from kvkeep.router.health.book import HealthBook, HealthSettings
from kvkeep.router.health.prober import MODELS_BYTES_MAX, Prober
from kvkeep.router.snapshot import Endpoint, EndpointState, Fleet
from tests.waiting import until

SETTINGS = HealthSettings(interval_s=0.05, timeout_s=60.0, failures_max=2, pause_s=0.05)
HASTY = msgspec.structs.replace(SETTINGS, timeout_s=0.3)
PATIENCE_S = 60.0


class Server:
    """A server that answers as told."""

    def __init__(self) -> None:
        self.status = 200
        self.models: bytes = b'{"data": [{"id": "m"}]}'
        self.hang: asyncio.Event | None = None
        self.probed = asyncio.Event()

    async def answer(self, request: web.Request) -> web.Response:
        if self.hang is not None:
            await self.hang.wait()
        if request.path == "/v1/models":
            return web.Response(body=self.models)
        self.probed.set()
        return web.Response(status=self.status)


class Watched(Fleet):
    """A fleet that tells of every change."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = asyncio.Event()

    def changed(self) -> None:
        super().changed()
        self.moved.set()

    async def until(self, is_so: Callable[[], bool]) -> None:
        await until(is_so, timeout_s=PATIENCE_S, changed=self.moved)


class Scene:
    """One endpoint, its server, and a prober at work."""

    def __init__(self, fleet: Watched, endpoint: Endpoint, server: Server) -> None:
        self.fleet, self.endpoint, self.server = fleet, endpoint, server
        self.shut: Callable[[], Awaitable[None]]

    async def until_state(self, state: EndpointState) -> None:
        await self.fleet.until(lambda: self.endpoint.state is state)


@pytest.fixture
def settings() -> HealthSettings:
    """A server that answers late is well; see HASTY."""
    return SETTINGS


@pytest.fixture
async def scene(settings: HealthSettings) -> AsyncIterator[Scene]:
    server, fleet = Server(), Watched()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", server.answer)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    endpoint = Endpoint("e", "127.0.0.1", runner.addresses[0][1])
    book = HealthBook(fleet, settings)
    fleet.join(endpoint)
    clock = SystemClock()
    book.join(endpoint, clock.now_s())
    probing = asyncio.create_task(Prober(book, settings, clock).run())
    scene = Scene(fleet, endpoint, server)
    scene.shut = runner.cleanup
    yield scene
    if server.hang is not None:
        server.hang.set()
    probing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await probing
    await runner.cleanup()


async def test_a_server_that_answers_is_ready_and_its_models_are_known(scene: Scene) -> None:
    """With the first probe; later changes are learned too."""
    await scene.until_state(EndpointState.READY)
    assert scene.endpoint.models == {"m"}
    scene.server.models = b'{"data": [{"id": "m"}, {"id": "lora"}]}'
    await scene.fleet.until(lambda: len(scene.endpoint.models) == 2)


async def test_a_server_that_is_ill_is_left_alone_until_it_is_well(scene: Scene) -> None:
    """As vLLM says 503 when its engine died."""
    await scene.until_state(EndpointState.READY)
    scene.server.status = 503
    await scene.until_state(EndpointState.DOWN)
    scene.server.status = 200
    await scene.until_state(EndpointState.READY)


@pytest.mark.parametrize("settings", [HASTY], ids=["hasty"])
async def test_a_server_that_hangs_is_left_alone(scene: Scene) -> None:
    """A probe has a time limit, and one that hangs is one only."""
    await scene.until_state(EndpointState.READY)
    scene.server.hang = asyncio.Event()
    await scene.until_state(EndpointState.DOWN)
    scene.server.hang.set()
    await scene.until_state(EndpointState.READY)


async def test_a_server_that_is_gone_is_left_alone(scene: Scene) -> None:
    """Nobody listens on its port any more."""
    await scene.until_state(EndpointState.READY)
    await scene.shut()
    await scene.until_state(EndpointState.DOWN)


@pytest.mark.parametrize(
    "models",
    [
        *(b"", b"nonsense", b"[]", b"{}", b'{"data": 1}', b'{"data": [1, {"id": 2}]}'),
        b"[" * 100_000,
        json.dumps({"data": [{"id": "x" * MODELS_BYTES_MAX}]}).encode(),
        json.dumps({"data": [{"id": str(i)} for i in range(5000)]}).encode(),
    ],
)
async def test_a_list_of_models_that_is_none_changes_nothing(scene: Scene, models: bytes) -> None:
    """The server is well, and may serve any model as before."""
    scene.server.models = models
    await scene.until_state(EndpointState.READY)
    for _ in range(2):
        scene.server.probed.clear()
        await asyncio.wait_for(scene.server.probed.wait(), PATIENCE_S)

    assert scene.endpoint.models == frozenset()
    assert scene.endpoint.state is EndpointState.READY
