"""The block events of one engine over ZMQ, as vLLM publishes them.

Threading and blocking: one task on the event loop. Bounded: messages waiting (ZMQ drops more, which
shows as a gap) and bytes of each.
"""

import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

import zmq
import zmq.asyncio

from kvkeep.model.clock import Clock
from kvkeep.router.events.block_events import BATCH_BYTES_MAX
from kvkeep.router.events.following import Follower, TakesEvents, Told

WAITING_MAX = 10_000
"""Messages that ZMQ keeps for us; an engine sends one per step."""
HEARTBEAT_MS = 5_000
"""An engine that does not answer for so long has lost its connection."""
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

    def at_rank(self, rank: int) -> "ZmqAddress":
        """Where a rank of the same engine publishes: ports follow each other (vllm 0.32)."""
        if not rank:
            return self
        replay = None if self.replay is None else _at_rank(self.replay, rank)
        return replace(self, events=_at_rank(self.events, rank), replay=replay)


class ZmqSource(Follower):
    """Feeds a table with the events of one engine until its task is cancelled."""

    def __init__(
        self, endpoint: str, address: ZmqAddress, table: TakesEvents, clock: Clock | None = None
    ) -> None:
        """Prepare; nothing is opened.

        Args:
            endpoint: The engine's name in the table.
            address: Where it publishes.
            table: What to feed.
            clock: Tells how long the engine was out of reach.
        """
        super().__init__(endpoint, table, clock)
        self._address = address
        self.can_ask = address.replay is not None
        self._context: zmq.asyncio.Context | None = None

    async def run(self) -> None:
        """Listen until cancelled; afterwards no socket is open."""
        self._context = context = zmq.asyncio.Context()
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
            await self.replay()
            await self._listen(subscription, monitor)
        finally:
            context.destroy(linger=0)

    async def _listen(self, subscription: zmq.asyncio.Socket, monitor: zmq.asyncio.Socket) -> None:
        poller = zmq.asyncio.Poller()
        poller.register(monitor, zmq.POLLIN)
        poller.register(subscription, zmq.POLLIN)
        while True:
            ready = dict(await poller.poll(None if self.lost_at_s is None else LOOK_MS))
            # The connection first: what came over a new one may be another engine's.
            if monitor in ready:
                frames = await monitor.recv_multipart()
                if int.from_bytes(frames[0][:2], sys.byteorder) == FOUND:
                    await self.found()
                else:
                    self.lost()
            elif subscription in ready:
                told = _told(await subscription.recv_multipart())
                if told is None:
                    self.counters.num_refused += 1
                else:
                    await self.heard(told)
            self.look()

    async def ask(self, first: int) -> AsyncGenerator[Told, None]:
        """Ask for all messages from a number on that are still to be had, in order."""
        assert self._context is not None
        assert self._address.replay is not None
        with self._context.socket(zmq.DEALER) as dealer:
            _limit(dealer)
            dealer.connect(self._address.replay)
            await dealer.send_multipart([b"", first.to_bytes(NUMBER_BYTES, "big")])
            while True:
                frames = await dealer.recv_multipart()
                # Some versions leave the topic out.
                number_and_payload = frames[-2:]
                if len(frames) < 3 or number_and_payload[0] == END:
                    return
                told = _told([b"", *number_and_payload])
                if told is None:
                    self.counters.num_refused += 1
                else:
                    yield told


def _at_rank(place: str, rank: int) -> str:
    host, _, port = place.rpartition(":")
    return f"{host}:{int(port) + rank}"


def _limit(socket: zmq.asyncio.Socket) -> None:
    socket.setsockopt(zmq.RCVHWM, WAITING_MAX)
    socket.setsockopt(zmq.MAXMSGSIZE, BATCH_BYTES_MAX)
    socket.setsockopt(zmq.LINGER, 0)


def _told(frames: list[bytes]) -> Told | None:
    """Return what a message tells; None if it is not a message of ours."""
    if len(frames) != 3 or len(frames[1]) != NUMBER_BYTES:
        return None
    number = int.from_bytes(frames[1], "big")
    return Told(number, frames[2]) if number < NUMBER_MAX else None
