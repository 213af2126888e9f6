"""The block events of one engine over ZMQ, as vLLM publishes them.

A message is (topic, sequence number, batch). A number that is missing means that news was lost: the
engine is asked to send it again, and where it can't, all that was known of it is forgotten, for a
removal may be among what was lost.

Threading and blocking: one task on the event loop. Bounded: messages waiting (ZMQ drops more, which
shows as a gap), bytes of each, batches and seconds of one replay.
"""

import asyncio
from dataclasses import dataclass

import zmq
import zmq.asyncio

from kvkeep.router.events.block_events import (
    BATCH_BYTES_MAX,
    BlockStored,
    EventBatch,
    decode_batch,
)
from kvkeep.router.prefix_index import PrefixIndex

WAITING_MAX = 10_000
"""Messages that ZMQ keeps for us; an engine sends one per step."""
REPLAY_TIMEOUT_S = 2.0
"""An engine looks for questions every 0.1 s when idle, and between two batches otherwise."""
REPLAY_BATCHES_MAX = 20_000
"""vLLM keeps 10,000 by default."""
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


@dataclass(slots=True)
class SourceCounters:
    """What happened; only grows."""

    num_batches: int = 0
    num_gaps: int = 0
    num_replayed: int = 0
    num_dropped: int = 0
    """How often all that was known of the engine was forgotten."""
    num_refused: int = 0
    """Messages that were not what they should be."""


class ZmqSource:
    """Feeds an index with the events of one engine until its task is cancelled."""

    def __init__(self, endpoint: str, address: ZmqAddress, index: PrefixIndex) -> None:
        """Prepare; nothing is opened.

        Args:
            endpoint: The endpoint's name in the index.
            address: Where the engine publishes.
            index: What to feed.
        """
        self._endpoint, self._address, self._index = endpoint, address, index
        self._next = 0
        self._newest_ts = 0.0
        self.counters = SourceCounters()

    async def run(self) -> None:
        """Listen until cancelled; afterwards no socket is open."""
        context = zmq.asyncio.Context()
        try:
            with context.socket(zmq.SUB) as subscription:
                _limit(subscription)
                subscription.subscribe(self._address.topic)
                if self._address.is_bound_here:
                    subscription.bind(self._address.events)
                else:
                    subscription.connect(self._address.events)
                # What was told before we came.
                await self._replay(context)
                while True:
                    await self._listen_once(context, await subscription.recv_multipart())
        finally:
            context.destroy(linger=0)

    async def _listen_once(self, context: zmq.asyncio.Context, frames: list[bytes]) -> None:
        number = _number_of(frames)
        if number is None:
            self.counters.num_refused += 1
            return
        batch = self._decode(frames[2])
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
        await self._take(batch)

    async def _replay(self, context: zmq.asyncio.Context) -> None:
        """Ask for everything from the next number on, and take it; stop at what is missing."""
        if self._address.replay is None:
            return
        with context.socket(zmq.DEALER) as dealer:
            _limit(dealer)
            dealer.connect(self._address.replay)
            try:
                async with asyncio.timeout(REPLAY_TIMEOUT_S):
                    await dealer.send_multipart([b"", self._next.to_bytes(NUMBER_BYTES, "big")])
                    for _ in range(REPLAY_BATCHES_MAX):
                        frames = await dealer.recv_multipart()
                        # Some versions leave the topic out.
                        number_and_batch = frames[-2:]
                        if len(frames) < 3 or number_and_batch[0] == END:
                            return
                        await self._take_replayed([b"", *number_and_batch])
            except TimeoutError:
                return

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
        self.counters.num_replayed += 1
        await self._take(self._decode(frames[2]))

    def _decode(self, payload: bytes) -> EventBatch | None:
        try:
            return decode_batch(payload)
        except ValueError:
            self.counters.num_refused += 1
            return None

    async def _take(self, batch: EventBatch | None) -> None:
        if batch is None:
            # Whatever it said is lost, and a removal may be among it.
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
