"""Forwards an engine's block events from ZMQ to NATS JetStream, one process beside each engine.

vLLM publishes over ZMQ only. What it tells is followed here as a router would follow it; what a
router would have to forget is forwarded as a clear, so that gaps between engine and forwarder need
no words of their own.

Bounded: events that wait while NATS is away; beyond that all is cleared and told from there on.
"""

import asyncio
import contextlib
import logging
import secrets
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import InputError
from kvkeep.router.events.block_events import AllBlocksCleared, BlockEvent, BlockStored
from kvkeep.router.events.nats_source import (
    BEFORE,
    CALL_TIMEOUT_S,
    NUMBER,
    RETRY_S,
    RUN,
    SUBJECTS,
    NatsAddress,
    close,
    connect,
)
from kvkeep.router.events.ranks import ranks_of
from kvkeep.router.events.zmq_source import ZmqAddress, ZmqSource
from kvkeep.router.prefix_index import BLOCKS_MAX

if TYPE_CHECKING:
    from nats.js.client import JetStreamContext

log = logging.getLogger(__name__)

EVENTS_MAX = 20_000
"""That wait."""
BATCH_TOKENS_MAX = 1 << 16
"""In one message, some 300 KiB: servers take 1 MiB by default."""
KEPT_MAX = 10_000
"""Messages that the stream keeps of each engine."""


class Forwarder:
    """A table for a source of events, which puts all it is told into a stream."""

    def __init__(self, address: NatsAddress) -> None:
        """Have nothing to forward."""
        self._address = address
        self._waiting: deque[BlockEvent] = deque()
        self._is_due = asyncio.Event()
        self._run = secrets.token_hex(8)
        self._clock = SystemClock()
        self.num_sent = 0
        """Messages that the stream has taken."""
        self.forwarding = asyncio.Event()
        """Set once the stream has taken the first one."""

    def apply(self, endpoint: str, event: BlockEvent) -> None:
        """Forward an event."""
        if len(self._waiting) >= EVENTS_MAX:
            log.warning("events are lost while NATS is away: routers forget this engine")
            self._waiting.clear()
            self._waiting.append(AllBlocksCleared())
        self._waiting.append(event)
        self._is_due.set()

    def drop(self, endpoint: str) -> None:
        """What was told of the engine does not hold any more."""
        self._waiting.clear()
        self.apply(endpoint, AllBlocksCleared())

    async def run(self, ranks: Sequence[ZmqAddress]) -> None:
        """Forward until cancelled.

        Args:
            ranks: Where each rank of the engine publishes.

        Raises:
            InputError: There can be no stream of that name on this server.
        """
        client = await connect(self._address.url)
        # A forwarder before this one may have told other things.
        self.drop("engine")
        sources = [
            ZmqSource("engine", address, table, self._clock)
            for address, table in zip(ranks, ranks_of(self, len(ranks), BLOCKS_MAX), strict=True)
        ]
        following = [asyncio.create_task(source.run()) for source in sources]
        try:
            stream = client.jetstream(timeout=CALL_TIMEOUT_S)
            await _make_stream(stream, self._address.subject)
            await self._send_all(stream)
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)
            await close(client)

    async def _send_all(self, stream: "JetStreamContext") -> None:
        before_seq = 0
        task = asyncio.current_task()
        # As in NatsSource.run: a cancellation may be swallowed.
        while task is None or not task.cancelling():
            await self._is_due.wait()
            batch = self._take_batch()
            payload = msgspec.msgpack.encode([self._clock.now_s(), batch, 0])
            headers = {
                NUMBER: str(self.num_sent),
                RUN: self._run,
                BEFORE: str(before_seq),
                # Sent twice, where the answer was lost, it is stored once.
                "Nats-Msg-Id": f"{self._run}-{self.num_sent}",
            }
            before_seq = await self._send(stream, payload, headers)
            self.num_sent += 1
            self.forwarding.set()

    def _take_batch(self) -> list[Any]:
        batch: list[BlockEvent] = []
        num_tokens = 0
        while self._waiting and num_tokens < BATCH_TOKENS_MAX and len(batch) < KEPT_MAX:
            event = self._waiting.popleft()
            batch.append(event)
            num_tokens += len(event.token_ids) if isinstance(event, BlockStored) else 1
        if not self._waiting:
            self._is_due.clear()
        return batch

    async def _send(
        self, stream: "JetStreamContext", payload: bytes, headers: dict[str, str]
    ) -> int:
        from nats.errors import Error

        task = asyncio.current_task()
        while task is None or not task.cancelling():
            with contextlib.suppress(Error, TimeoutError):
                taken = await stream.publish(
                    self._address.subject, payload, timeout=CALL_TIMEOUT_S, headers=headers
                )
                return taken.seq
            await asyncio.sleep(RETRY_S)
        raise asyncio.CancelledError


async def _make_stream(stream: "JetStreamContext", subject: str) -> None:
    from nats.js.api import DiscardPolicy, StreamConfig
    from nats.js.errors import BadRequestError, NotFoundError

    with contextlib.suppress(NotFoundError):
        await stream.find_stream_name_by_subject(subject)
        return
    config = StreamConfig(
        name=SUBJECTS.replace(".", "-"),
        subjects=[f"{SUBJECTS}.>"],
        max_msgs_per_subject=KEPT_MAX,
        discard=DiscardPolicy.OLD,
        duplicate_window=120.0,
    )
    try:
        await stream.add_stream(config)
    except BadRequestError as error:
        raise InputError(f"the stream {config.name} can't be made: {error}") from error
