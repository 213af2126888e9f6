"""Block events over a real NATS server with JetStream, and the forwarder that brings them there."""

import asyncio
import gc
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import nats
import pytest
import zmq.asyncio

from kvkeep.router.events.following import Follower
from kvkeep.router.events.nats_forwarder import Forwarder
from kvkeep.router.events.nats_source import BEFORE, NUMBER, RUN, NatsAddress, NatsSource
from kvkeep.router.prefix_index import PrefixIndex
from kvkeep.testing.tcp_proxy import FaultyRelay
from tests.integration.source_contract import (
    BLOCK_TOKENS,
    FIRST,
    NAME,
    SECOND,
    THIRD,
    SourceContract,
    held,
    stored,
)
from tests.integration.test_router_events import Publisher
from tests.servers.nats import NatsServer
from tests.waiting import until

pytestmark = [
    pytest.mark.allow_hosts(["127.0.0.1"]),
    # nats-py 2.16 leaves the writer of a lost connection to the collector.
    pytest.mark.filterwarnings(
        "ignore:.*StreamWriter.__del__.*:pytest.PytestUnraisableExceptionWarning"
    ),
]

STREAM = "kvkeep-events"


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """What nats-py left is collected while its warnings are expected."""
    yield
    gc.collect()


@pytest.fixture
def server() -> Iterator[NatsServer]:
    """Each test has its own, and may kill it."""
    server = NatsServer()
    try:
        yield server.run()
    finally:
        server.stop()


class NatsRig:
    """Publishes into the stream as the forwarder does."""

    def __init__(self, client: Any, relay: FaultyRelay, subject: str) -> None:
        self.relay, self.subject = relay, subject
        self._stream = client.jetstream()
        self._number, self._run, self._before = 0, "first", 0
        self._ts = 1.0

    async def publish(self, *events: dict[str, Any]) -> None:
        self._ts += 1.0
        await self.publish_bytes(msgspec.msgpack.encode([self._ts, list(events), 0]))

    async def publish_bytes(self, payload: bytes) -> None:
        headers = {NUMBER: str(self._number), RUN: self._run, BEFORE: str(self._before)}
        taken = await self._stream.publish(self.subject, payload, headers=headers)
        self._before = taken.seq
        self._number += 1

    def lose(self) -> None:
        self._number += 1

    def restart(self) -> None:
        self._number, self._run = 0, "second"

    @asynccontextmanager
    async def followed(self) -> AsyncIterator[tuple[Follower, PrefixIndex]]:
        index = PrefixIndex(BLOCK_TOKENS)
        address = NatsAddress(f"nats://127.0.0.1:{self.relay.address[1]}", self.subject)
        source = NatsSource(NAME, address, index)
        task = asyncio.create_task(source.run())
        try:
            await until(lambda: source.is_connected)
            yield source, index
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class TestNatsSource(SourceContract):
    """The contract of sources, over NATS."""

    @pytest.fixture
    async def rig(
        self, server: NatsServer, request: pytest.FixtureRequest
    ) -> AsyncIterator[NatsRig]:
        """A subject, and a relay before the server."""
        client = await nats.connect(server.url)
        await client.jetstream().add_stream(name=STREAM, subjects=["kvkeep.events.>"])
        with FaultyRelay(("127.0.0.1", server.port)) as relay:
            yield NatsRig(client, relay, f"kvkeep.events.{request.node.name}")
        await client.close()


@asynccontextmanager
async def engine() -> AsyncIterator[Publisher]:
    """An engine that publishes over ZMQ."""
    context = zmq.asyncio.Context()
    publisher = Publisher(context)
    serving = asyncio.create_task(publisher.serve())
    try:
        yield publisher
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        context.destroy(linger=0)


async def test_an_engine_is_heard_through_the_stream(server: NatsServer) -> None:
    """What an engine told before, tells, and forgets on its way reaches a router over NATS."""
    address = NatsAddress(server.url, "kvkeep.events.forwarded")
    async with engine() as publisher:
        await publisher.publish(stored(FIRST, 11), is_lost=True)
        forwarder = Forwarder(address)
        forwarding = asyncio.create_task(forwarder.run([publisher.address]))
        await asyncio.wait_for(forwarder.forwarding.wait(), 60)
        index = PrefixIndex(BLOCK_TOKENS)
        following = asyncio.create_task(NatsSource(NAME, address, index).run())
        await until(lambda: held(index, FIRST) == 1)
        while held(index, FIRST, SECOND) < 2:
            await publisher.publish(stored(SECOND, 12, parent=11))
            await asyncio.sleep(0.01)
        publisher.restart()
        publisher.ts += 100
        await publisher.publish(stored(THIRD, 33))
        await until(lambda: held(index, THIRD) == 1)

        assert held(index, FIRST) == 0
        for task in (forwarding, following):
            task.cancel()
        await asyncio.gather(forwarding, following, return_exceptions=True)


async def test_the_ranks_of_one_engine_are_heard_as_one(server: NatsServer) -> None:
    """What either tells comes through one subject, and what one clears the other still holds."""
    address = NatsAddress(server.url, "kvkeep.events.ranks")
    index = PrefixIndex(BLOCK_TOKENS)
    async with engine() as first, engine() as second:
        await first.publish(stored(FIRST, 11), is_lost=True)
        await second.publish(stored(FIRST, 21), stored(SECOND, 22, parent=21), is_lost=True)
        forwarder = Forwarder(address)
        tasks = [
            asyncio.create_task(forwarder.run([first.address, second.address])),
            asyncio.create_task(NatsSource(NAME, address, index).run()),
        ]
        await until(lambda: held(index, FIRST, SECOND) == 2)
        while held(index, FIRST, SECOND) == 2:
            await second.publish({"type": "AllBlocksCleared"})
            await asyncio.sleep(0.01)

        assert held(index, FIRST) == 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_events_outlast_the_server(server: NatsServer) -> None:
    """A killed server costs time: what happened meanwhile arrives once it is back."""
    address = NatsAddress(server.url, "kvkeep.events.outlasting")
    index = PrefixIndex(BLOCK_TOKENS)
    async with engine() as publisher:
        forwarder = Forwarder(address)
        source = NatsSource(NAME, address, index)
        tasks = [
            asyncio.create_task(forwarder.run([publisher.address])),
            asyncio.create_task(source.run()),
        ]
        while not held(index, FIRST):
            await publisher.publish(stored(FIRST, 11))
            await asyncio.sleep(0.01)
        server.kill()
        await until(lambda: not source.is_connected)
        await publisher.publish(stored(SECOND, 12, parent=11))
        server.run()
        await until(lambda: held(index, FIRST, SECOND) == 2)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_the_command_says_when_it_forwards(server: NatsServer) -> None:
    """One line of JSON once the stream has taken a message; it ends when told, with code 0."""
    command = [sys.executable, "-m", "kvkeep", "forward", "engine-1", "--nats", server.url]
    process = subprocess.Popen([*command, "--events", "tcp://127.0.0.1:1"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        line = msgspec.json.decode(process.stdout.readline())
        process.send_signal(signal.SIGTERM)

        assert line == {"event": "forwarding", "subject": "kvkeep.events.engine-1"}
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(60)
        process.stdout.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a b", "--events", "tcp://h:1", "--nats", "nats://h:1"], "name"),
        (["a", "--events", "h:1", "--nats", "nats://h:1"], "publish"),
        (["a", "--events", "tcp://h:1", "--nats", "tcp://h:1"], "--nats"),
        (["a", "--events", "tcp://h:x", "--nats", "nats://h:1", "--ranks", "2"], "tcp://h:x"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], said: str) -> None:
    """Exit code 2, and what to write instead."""
    ended = subprocess.run(
        [sys.executable, "-m", "kvkeep", "forward", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert ended.returncode == 2
    assert said in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
