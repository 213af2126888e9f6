"""Block events over real ZMQ sockets: in order, with gaps, from engines that restart, hostile."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from kvkeep.model.clock import Clock, SystemClock
from kvkeep.router.events import following, zmq_source
from kvkeep.router.events.feeds import EventFeeds
from kvkeep.router.events.following import Follower
from kvkeep.router.events.settings import EngineEvents
from kvkeep.router.events.zmq_source import ZmqAddress, ZmqSource
from kvkeep.router.prefix_index import PrefixIndex
from kvkeep.router.snapshot import Endpoint
from kvkeep.testing.tcp_proxy import FaultyRelay, NetworkFault
from tests.integration.source_contract import (
    BLOCK_TOKENS,
    FIRST,
    NAME,
    SECOND,
    THIRD,
    SourceContract,
    held,
    removed,
    stored,
)
from tests.servers.processes import free_port
from tests.waiting import until


class Publisher:
    """Publishes as an engine does: PUB for what is new, ROUTER for what is asked again."""

    def __init__(self, context: zmq.asyncio.Context, addresses: Sequence[str] = ()) -> None:
        self._events = context.socket(zmq.PUB)
        self._replay = context.socket(zmq.ROUTER)
        self.number = 0
        self.ts = 1.0
        self.buffer: list[tuple[int, bytes]] = []
        sockets = (self._events, self._replay)
        self.addresses = list(addresses) or [f"tcp://127.0.0.1:{free_port()}" for _ in sockets]
        for socket, address in zip(sockets, self.addresses, strict=False):
            socket.bind(address)
        self.address = ZmqAddress(self.addresses[0], self.addresses[1])

    async def publish(self, *events: dict[str, Any], is_lost: bool = False) -> None:
        self.ts += 1.0
        payload = msgspec.msgpack.encode([self.ts, list(events), 0])
        await self.publish_bytes(payload, is_lost=is_lost)

    async def publish_bytes(self, payload: bytes, *, is_lost: bool = False) -> None:
        self.buffer.append((self.number, payload))
        if not is_lost:
            number = self.number.to_bytes(8, "big")
            await self._events.send_multipart([b"kv", number, payload])
        self.number += 1

    async def send(self, *frames: bytes) -> None:
        await self._events.send_multipart(frames)

    def restart(self) -> None:
        self.number, self.buffer = 0, []

    async def serve(self) -> None:
        while True:
            client, _, first = await self._replay.recv_multipart()
            for number, payload in list(self.buffer):
                if number >= int.from_bytes(first, "big"):
                    number_bytes = number.to_bytes(8, "big")
                    await self._replay.send_multipart([client, b"", b"kv", number_bytes, payload])
            await self._replay.send_multipart([client, b"", b"", b"\xff" * 8, b""])


class ZmqRig:
    """An engine behind a relay."""

    def __init__(self, publisher: Publisher, relay: FaultyRelay) -> None:
        self._publisher, self.relay = publisher, relay

    async def publish(self, *events: dict[str, Any]) -> None:
        await self._publisher.publish(*events)

    async def publish_bytes(self, payload: bytes) -> None:
        await self._publisher.publish_bytes(payload)

    def lose(self) -> None:
        self._publisher.number += 1

    def restart(self) -> None:
        self._publisher.restart()

    @asynccontextmanager
    async def followed(self) -> AsyncIterator[tuple[Follower, PrefixIndex]]:
        address = f"tcp://127.0.0.1:{self.relay.address[1]}"
        replay = self._publisher.addresses[1]
        async with followed(ZmqAddress(address, replay)) as (source, index):
            # A subscription takes a moment to reach the publisher, and nothing says when it has.
            while not source.counters.num_batches or not source.is_connected:
                await self._publisher.publish()
                await asyncio.sleep(0.01)
            yield source, index


class TestZmqSource(SourceContract):
    """The contract of sources, over ZMQ."""

    @pytest.fixture
    async def rig(self) -> AsyncIterator[ZmqRig]:
        """An engine, and a relay before its events."""
        async with publishing(()) as publisher:
            port = int(publisher.addresses[0].rpartition(":")[2])
            with FaultyRelay(("127.0.0.1", port)) as relay:
                yield ZmqRig(publisher, relay)


@asynccontextmanager
async def listening(
    *, has_replay: bool = True
) -> AsyncIterator[tuple[Publisher, ZmqSource, PrefixIndex]]:
    """An engine and a source that has heard it once."""
    index = PrefixIndex(BLOCK_TOKENS)
    context = zmq.asyncio.Context()
    publisher = Publisher(context)
    address = publisher.address if has_replay else ZmqAddress(publisher.address.events)
    source = ZmqSource(NAME, address, index)
    tasks = [asyncio.create_task(publisher.serve()), asyncio.create_task(source.run())]
    try:
        # A subscription takes a moment to reach the publisher, and nothing says when it has.
        while not source.counters.num_batches or not source.is_connected:
            await publisher.publish()
            await asyncio.sleep(0.01)
        yield publisher, source, index
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        context.destroy(linger=0)


async def test_lost_events_are_replayed() -> None:
    """A gap in the numbers is filled by what the engine sends again, nothing is forgotten."""
    async with listening() as (publisher, source, index):
        await publisher.publish(stored(FIRST, 11))
        await until(lambda: held(index, FIRST) == 1)
        dropped = source.counters.num_dropped
        await publisher.publish(stored(SECOND, 12, parent=11), is_lost=True)
        await publisher.publish(stored(THIRD, 13, parent=12))
        await until(lambda: held(index, FIRST, SECOND, THIRD) == 3)

        assert source.counters.num_gaps >= 1
        assert source.counters.num_dropped == dropped


@pytest.mark.parametrize("has_replay", [True, False])
async def test_events_lost_for_good_forget_the_engine(*, has_replay: bool) -> None:
    """Where news can't be had again, what was known may be wrong, and what comes later is not."""
    async with listening(has_replay=has_replay) as (publisher, source, index):
        await publisher.publish(stored(FIRST, 11))
        await until(lambda: held(index, FIRST) == 1)
        dropped = source.counters.num_dropped
        await publisher.publish(removed(11), is_lost=True)
        publisher.buffer.clear()
        await publisher.publish(stored(SECOND, 22))
        await until(lambda: held(index, SECOND) == 1)

        assert held(index, FIRST) == 0
        assert source.counters.num_dropped == dropped + 1


@asynccontextmanager
async def publishing(addresses: Sequence[str]) -> AsyncIterator[Publisher]:
    """An engine at given addresses, gone without a word afterwards."""
    context = zmq.asyncio.Context()
    publisher = Publisher(context, addresses)
    serving = asyncio.create_task(publisher.serve())
    try:
        yield publisher
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        context.destroy(linger=0)


@asynccontextmanager
async def followed(
    address: ZmqAddress, clock: Clock | None = None
) -> AsyncIterator[tuple[ZmqSource, PrefixIndex]]:
    """A source that follows an address."""
    index = PrefixIndex(BLOCK_TOKENS)
    source = ZmqSource(NAME, address, index, clock)
    task = asyncio.create_task(source.run())
    try:
        yield source, index
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("has_replay", [True, False])
async def test_an_engine_killed_and_restarted_is_known_anew(*, has_replay: bool) -> None:
    """Another engine at the same address is not taken for the first, though its numbers go on."""
    addresses = [f"tcp://127.0.0.1:{free_port()}" for _ in range(2)]
    address = ZmqAddress(addresses[0], addresses[1] if has_replay else None)
    async with followed(address) as (source, index):
        async with publishing(addresses) as first:
            await until(lambda: source.is_connected)
            while not held(index, FIRST):
                await first.publish(stored(FIRST, 11))
                await asyncio.sleep(0.01)
            number = first.number
        await until(lambda: not source.is_connected)
        async with publishing(addresses) as second:
            second.ts = first.ts + 100
            for _ in range(number):
                await second.publish(stored(SECOND, 22), is_lost=True)
            await until(lambda: source.is_connected)
            while not held(index, THIRD):
                await second.publish(stored(THIRD, 33))
                await asyncio.sleep(0.01)

            assert held(index, FIRST) == 0
            assert held(index, SECOND) == (1 if has_replay else 0)


class ManualClock:
    """Time that a test moves."""

    at_s = 1000.0

    def now_s(self) -> float:
        """What the test says."""
        return self.at_s


async def test_a_frozen_publisher_is_forgotten_and_found_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An engine that stops without closing anything is noticed; thawed, it is asked for all."""
    monkeypatch.setattr(zmq_source, "HEARTBEAT_MS", 100)
    clock = ManualClock()
    async with publishing(()) as publisher:
        ports = [int(each.rpartition(":")[2]) for each in publisher.addresses]
        with FaultyRelay(("127.0.0.1", ports[0])) as relay:
            address = ZmqAddress(f"tcp://127.0.0.1:{relay.address[1]}", publisher.addresses[1])
            async with followed(address, clock) as (source, index):
                await publisher.publish(stored(FIRST, 11), is_lost=True)
                await until(lambda: source.is_connected and held(index, FIRST) == 1)
                relay.strike(NetworkFault.FROZEN)
                await until(lambda: not source.is_connected)
                was_kept = held(index, FIRST)
                clock.at_s += following.FORGET_S + 1
                await until(lambda: held(index, FIRST) == 0)
                relay.heal()
                await until(lambda: held(index, FIRST) == 1)

                assert was_kept == 1


async def test_hostile_messages_are_refused_and_survived() -> None:
    """Wrong frames, wrong bytes and wrong types are counted; the next good event is understood."""
    async with listening() as (publisher, source, index):
        await publisher.send(b"kv")
        await publisher.send(b"kv", b"short", b"")
        await publisher.send(b"kv", b"\xff" * 8, b"")
        for payload in (b"", b"\xc1", b"\x93\x01\x02", b"\x91" * 5000, msgspec.msgpack.encode([1])):
            await publisher.publish_bytes(payload)
        await publisher.publish({**stored(FIRST, 11), "token_ids": [-1] * BLOCK_TOKENS})
        await publisher.publish(stored(SECOND, 22))
        await until(lambda: held(index, SECOND) == 1)

        assert source.counters.num_refused == 9
        index.check()


async def test_a_fleet_is_heard_while_it_is_in() -> None:
    """Who joins is listened to at its address, who leaves is not, a bad address harms no one."""
    index, context = PrefixIndex(BLOCK_TOKENS), zmq.asyncio.Context()
    publisher = Publisher(context)
    port, replay = (each.rpartition(":")[2] for each in publisher.addresses)
    default = EngineEvents(publish=f"tcp://{{host}}:{port}", replay=f"tcp://{{host}}:{replay}")
    said = {"silent": EngineEvents(), "wrong": EngineEvents(publish="tcp://127.0.0.1:none")}
    feeds = EventFeeds(default, index, SystemClock())
    serving = asyncio.create_task(publisher.serve())
    for name in (NAME, "silent", "wrong"):
        feeds.joined(Endpoint(name, "127.0.0.1", 1, events=said.get(name)))
    await publisher.publish(stored(FIRST, 11), is_lost=True)
    while not held(index, FIRST):
        await publisher.publish(stored(FIRST, 11))
        await asyncio.sleep(0.01)

    await until(lambda: feeds.is_heard(NAME))
    assert [feeds.is_heard(name) for name in (NAME, "silent", "wrong")] == [True, False, False]
    heard = feeds.counters.num_batches
    feeds.left(Endpoint(name=NAME, host="127.0.0.1", port=1))
    assert not feeds.is_heard(NAME)
    assert feeds.counters.num_batches == heard
    await feeds.close()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    context.destroy(linger=0)


def ports_in_a_row(count: int) -> int:
    """The first of so many free ports."""
    while True:
        ports = [free_port() for _ in range(count)]
        if ports == list(range(ports[0], ports[0] + count)):
            return ports[0]


async def test_each_rank_of_an_engine_is_followed_at_its_own_port() -> None:
    """Lost events of one are replayed, or it alone is forgotten; the engine is heard with all."""
    index, num_ranks = PrefixIndex(BLOCK_TOKENS), 3
    events, replay = ports_in_a_row(num_ranks), ports_in_a_row(num_ranks)
    said = EngineEvents(
        publish=f"tcp://{{host}}:{events}", replay=f"tcp://{{host}}:{replay}", ranks=num_ranks
    )
    feeds = EventFeeds(said, index, SystemClock())
    async with AsyncExitStack() as stack:
        stack.push_async_callback(feeds.close)
        places = [
            [f"tcp://127.0.0.1:{first + rank}" for first in (events, replay)]
            for rank in range(num_ranks)
        ]
        ranks = [await stack.enter_async_context(publishing(each)) for each in places[:-1]]
        feeds.joined(Endpoint(NAME, "127.0.0.1", 1))
        sources = [source for source, _ in feeds._engines._running[NAME]]
        await until(lambda: sum(each.is_connected for each in sources) == len(ranks))
        assert not feeds.is_heard(NAME)
        ranks.append(await stack.enter_async_context(publishing(places[-1])))
        for publisher, source in zip(ranks, sources, strict=True):
            # A subscription takes a moment to reach the publisher, and nothing says when it has.
            while not source.counters.num_batches or not source.is_connected:
                await publisher.publish()
                await asyncio.sleep(0.01)
        await until(lambda: (feeds.is_heard(NAME), feeds.num_heard) == (True, 1))
        gaps = [source.counters.num_gaps for source in sources]

        await ranks[0].publish(stored(FIRST, 11))
        await ranks[1].publish(stored(FIRST, 21), stored(SECOND, 22, parent=21))
        await ranks[2].publish(stored(FIRST, 31))
        await until(lambda: held(index, FIRST, SECOND) == 2)
        await ranks[1].publish(stored(THIRD, 23, parent=22), is_lost=True)
        await ranks[1].publish()
        await until(lambda: held(index, FIRST, SECOND, THIRD) == 3)
        assert [source.counters.num_gaps for source in sources] == [gaps[0], gaps[1] + 1, gaps[2]]
        ranks[1].number += 1
        await ranks[1].publish()
        await until(lambda: held(index, FIRST, SECOND) < 2)

        assert held(index, FIRST) == 1
        assert [source.counters.num_dropped for source in sources] == [0, 1, 0]
        feeds.left(Endpoint(NAME, "127.0.0.1", 1))
        assert (feeds.is_heard(NAME), feeds.num_heard) == (False, 0)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rank", [0, 1])
async def test_the_publisher_of_vllm_is_understood(rank: int) -> None:
    """The format is vLLM's own: its publisher's events, live and replayed, are followed.

    A data-parallel rank publishes as many ports above the ones it was told as its number.
    """
    from vllm.distributed import kv_events

    index = PrefixIndex(BLOCK_TOKENS)
    ports = [ports_in_a_row(2) for _ in range(2)]
    told = [f"tcp://*:{ports[0]}", f"tcp://127.0.0.1:{ports[1]}"]
    publisher = kv_events.ZmqEventPublisher(rank, *told)

    def publish(*events: Any) -> None:
        publisher.publish(kv_events.KVEventBatch(ts=1.0, events=list(events)))

    def block(tokens: list[int], name: int, parent: int | None) -> Any:
        return kv_events.BlockStored(
            block_hashes=[name],
            parent_block_hash=parent,
            token_ids=tokens,
            block_size=BLOCK_TOKENS,
            lora_id=None,
            medium="GPU",
            lora_name=None,
            extra_keys=[("salt",)] if tokens is THIRD else None,
            group_idx=0,
        )

    publish(block(FIRST, 2**64 - 1, None))
    address = ZmqAddress(f"tcp://127.0.0.1:{ports[0]}", f"tcp://127.0.0.1:{ports[1]}")
    source = ZmqSource(NAME, address.at_rank(rank), index)
    task = asyncio.create_task(source.run())
    try:
        await until(lambda: held(index, FIRST) == 1)
        publish(block(SECOND, 12, 2**64 - 1), block(THIRD, 13, None))
        await until(lambda: held(index, FIRST, SECOND) == 2)

        assert held(index, THIRD) == 0
        publish(kv_events.BlockRemoved(block_hashes=[12], medium="GPU", group_idx=0))
        await until(lambda: held(index, FIRST, SECOND) == 1)
        publish(kv_events.AllBlocksCleared())
        await until(lambda: held(index, FIRST) == 0)
        assert source.counters.num_refused == 0
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await asyncio.to_thread(publisher.shutdown)
        zmq.Context.instance().term()
