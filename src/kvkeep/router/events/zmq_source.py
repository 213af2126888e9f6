"""The block events of one engine over ZMQ, as vLLM publishes them.

A message is (topic, sequence number, batch). A number that is missing means that news was lost: the
engine is asked to send it again, and where it can't, all that was known of it is forgotten, for a
removal may be among what was lost. The same after a lost connection: an engine that can repeat its
last batch is the one that was known, and any other one begins anew.

Threading and blocking: one task on the event loop. Bounded: messages waiting (ZMQ drops more, which
shows as a gap), bytes of each, batches and seconds of one replay.
"""

import asyncio
import sys
from dataclasses import dataclass
from typing import Protocol

import xxhash
import zmq
import zmq.asyncio

from kvkeep.model.clock import Clock, SystemClock
from kvkeep.router.events.block_events import (
    BATCH_BYTES_MAX,
    BlockEvent,
    BlockStored,
    EventBatch,
    decode_batch,
)
from kvkeep.router.events.source_counters import SourceCounters

WAITING_MAX = 10_000
"""Messages that ZMQ keeps for us; an engine sends one per step."""
REPLAY_TIMEOUT_S = 2.0
"""An engine looks for questions every 0.1 s when idle, and between two batches otherwise."""
REPLAY_BATCHES_MAX = 20_000
"""vLLM keeps 10,000 by default."""
HEARTBEAT_MS = 5_000
"""An engine that does not answer for so long has lost its connection."""
FORGET_S = 30.0
"""What is known of an engine that was not heard for so long is worth nothing, and takes room."""
LOOK_MS = 500
LOST, FOUND = int(zmq.EVENT_DISCONNECTED), int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
NUMBER_BYTES = 8
END = (-1).to_bytes(NUMBER_BYTES, "big", signed=True)
NUMBER_MAX = 1 << 62


@dataclass(frozen=True, slots=True)
class ZmqAddress:
    """Where an engine publishes."""

    events: str
    """``--kv-events-config``'s ``endpoint``, as seen from here: tcp://host:5557."""
    replay: str | None = None
    """Its ``replay_endpoint``; None: lost news is not asked for again."""
    topic: str = ""
    """Beginning of the topics to listen to."""
    is_bound_here: bool = False
    """The engine connects and the router binds: vLLM does so if its ``endpoint`` names a host."""


class TakesEvents(Protocol):
    """What a source feeds."""

    def apply(self, endpoint: str, event: BlockEvent) -> None:
        """Somebody said what is stored there, or no more."""
        ...

    def drop(self, endpoint: str) -> None:
        """Nothing is known of it any more."""
        ...


class ZmqSource:
    """Feeds an index with the events of one engine until its task is cancelled."""

    def __init__(
        self, endpoint: str, address: ZmqAddress, index: TakesEvents, clock: Clock | None = None
    ) -> None:
        """Prepare; nothing is opened.

        Args:
            endpoint: The endpoint's name in the index.
            address: Where the engine publishes.
            index: What to feed.
            clock: Tells how long the engine was out of reach.
        """
        self._endpoint, self._address, self._index = endpoint, address, index
        self._clock = clock or SystemClock()
        self._next = 0
        self._newest_ts = 0.0
        self._last_digest = 0
        """Of the batch before the next: who can repeat it is the engine that was known."""
        self._lost_at_s: float | None = None
        """Since when what is known can't be renewed; None if it can, or nothing is known."""
        self.is_connected = False
        self.counters = SourceCounters()

    # ---- the connection

    async def run(self) -> None:
        """Listen until cancelled; afterwards no socket is open."""
        context = zmq.asyncio.Context()
        try:
            subscription = context.socket(zmq.SUB)
            _limit(subscription)
            for option in (zmq.HEARTBEAT_IVL, zmq.HEARTBEAT_TIMEOUT):
                # An engine that is stopped, or whose host is gone, closes nothing.
                subscription.setsockopt(option, HEARTBEAT_MS)
            subscription.subscribe(self._address.topic)
            monitor = subscription.get_monitor_socket(LOST | FOUND)
            if self._address.is_bound_here:
                subscription.bind(self._address.events)
            else:
                subscription.connect(self._address.events)
            # What was told before we came.
            await self._replay(context)
            await self._listen(context, subscription, monitor)
        finally:
            context.destroy(linger=0)

    async def _listen(
        self,
        context: zmq.asyncio.Context,
        subscription: zmq.asyncio.Socket,
        monitor: zmq.asyncio.Socket,
    ) -> None:
        poller = zmq.asyncio.Poller()
        poller.register(monitor, zmq.POLLIN)
        poller.register(subscription, zmq.POLLIN)
        while True:
            ready = dict(await poller.poll(None if self._lost_at_s is None else LOOK_MS))
            # The connection first: what came over a new one may be another engine's.
            if monitor in ready:
                frames = await monitor.recv_multipart()
                await self._connection_changed(
                    context, int.from_bytes(frames[0][:2], sys.byteorder)
                )
            elif subscription in ready:
                await self._listen_once(context, await subscription.recv_multipart())
            lost_at_s = self._lost_at_s
            if lost_at_s is not None and self._clock.now_s() - lost_at_s > FORGET_S:
                self._forget(0)

    async def _connection_changed(self, context: zmq.asyncio.Context, event: int) -> None:
        if event == FOUND:
            self.is_connected = True
            await self._resume(context)
            return
        if not self.is_connected:
            return
        self.is_connected = False
        self.counters.num_losses += 1
        if self._address.replay is None:
            # Nobody can say what was missed, nor whether it is the same engine that comes back.
            self._forget(0)
        elif self._next:
            self._lost_at_s = self._clock.now_s()

    async def _resume(self, context: zmq.asyncio.Context) -> None:
        """Take what was missed without a connection; of another engine, everything."""
        if self._address.replay is None:
            return
        if self._next:
            before, self._next = self._next, self._next - 1
            if not await self._replay(context, self._last_digest):
                self._next = before
                self._forget(0)
        self._lost_at_s = None
        if not self._next:
            await self._replay(context)

    async def _replay(self, context: zmq.asyncio.Context, last_digest: int | None = None) -> bool:
        """Ask for everything from the next number on, and take it; stop at what is missing.

        Args:
            context: For the question.
            last_digest: Take nothing unless the first batch that comes is this one.

        Returns:
            Whether it was; True if that did not matter.
        """
        is_sure = last_digest is None
        if self._address.replay is None:
            return is_sure
        with context.socket(zmq.DEALER) as dealer:
            _limit(dealer)
            dealer.connect(self._address.replay)
            try:
                async with asyncio.timeout(REPLAY_TIMEOUT_S):
                    await dealer.send_multipart([b"", self._next.to_bytes(NUMBER_BYTES, "big")])
                    for _ in range(REPLAY_BATCHES_MAX):
                        frames = await dealer.recv_multipart()
                        # Some versions leave the topic out.
                        number, payload = frames[-2:] if len(frames) > 2 else (END, b"")
                        if number == END:
                            return is_sure
                        if is_sure:
                            await self._take_replayed([b"", number, payload])
                            continue
                        if _number_of([b"", number, payload]) != self._next:
                            return False
                        if _digest(payload) != last_digest:
                            return False
                        is_sure = True
                        self._next += 1
            except TimeoutError:
                pass
        return is_sure

    # ---- messages

    async def _listen_once(self, context: zmq.asyncio.Context, frames: list[bytes]) -> None:
        number = _number_of(frames)
        if number is None:
            self.counters.num_refused += 1
            return
        batch = _decode(frames[2])
        if number < self._next:
            if batch is None or batch.ts <= self._newest_ts:
                # It was replayed before its turn in the queue came.
                return
            # The engine started anew, and counts from 0 again.
            self._forget(0)
        if number > self._next:
            self.counters.num_gaps += 1
            await self._replay(context)
            if number < self._next:
                return
            if number > self._next:
                self._forget(number)
        self._next = number + 1
        self._last_digest = _digest(frames[2])
        await self._take(batch)

    async def _take_replayed(self, frames: list[bytes]) -> None:
        number = _number_of(frames)
        if number is None:
            self.counters.num_refused += 1
            return
        if number < self._next:
            return
        if number > self._next:
            # Its buffer does not reach back far enough.
            self._forget(number)
        self._next = number + 1
        self._last_digest = _digest(frames[2])
        self.counters.num_replayed += 1
        await self._take(_decode(frames[2]))

    async def _take(self, batch: EventBatch | None) -> None:
        if batch is None:
            # Whatever it said is lost, and a removal may be among it.
            self.counters.num_refused += 1
            self._forget(self._next)
            return
        self.counters.num_batches += 1
        self._newest_ts = max(self._newest_ts, batch.ts)
        num_blocks = 0
        for event in batch.events:
            self._index.apply(self._endpoint, event)
            num_blocks += len(event.block_hashes) if isinstance(event, BlockStored) else 1
            if num_blocks > APPLIED_AT_ONCE:
                # Requests are relayed by the same thread.
                num_blocks = 0
                await asyncio.sleep(0)

    def _forget(self, next_number: int) -> None:
        self._index.drop(self._endpoint)
        self._next = next_number
        self._lost_at_s = None
        self.counters.num_dropped += 1


APPLIED_AT_ONCE = 512
"""Blocks taken before requests get a turn: about a millisecond of work."""


def _limit(socket: zmq.asyncio.Socket) -> None:
    socket.setsockopt(zmq.RCVHWM, WAITING_MAX)
    socket.setsockopt(zmq.MAXMSGSIZE, BATCH_BYTES_MAX)
    socket.setsockopt(zmq.LINGER, 0)


def _number_of(frames: list[bytes]) -> int | None:
    """Return the sequence number of a message; None if it is not a message of ours."""
    if len(frames) != 3 or len(frames[1]) != NUMBER_BYTES:
        return None
    number = int.from_bytes(frames[1], "big")
    return number if number < NUMBER_MAX else None


def _decode(payload: bytes) -> EventBatch | None:
    try:
        return decode_batch(payload)
    except ValueError:
        return None


def _digest(payload: bytes) -> int:
    return xxhash.xxh3_64_intdigest(payload)
