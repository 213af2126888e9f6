"""From messages about blocks to a table: in order, with gaps, from publishers that restart.

A message is (sequence number, batch). A number that is missing means that news was lost: the
publisher is asked to send it again, and where it can't, all that was known of it is forgotten, for
a removal may be among what was lost. The same after a lost connection: a publisher that can repeat
its last batch is the one that was known, and any other one begins anew.

Threading and blocking: one task on the event loop. Bounded: bytes of each message, messages and
seconds of one replay.
"""

import asyncio
import contextlib
from abc import abstractmethod
from collections.abc import AsyncGenerator
from typing import NamedTuple, Protocol

import xxhash

from kvkeep.model.clock import Clock, SystemClock
from kvkeep.router.events.block_events import BlockEvent, BlockStored, EventBatch, decode_batch
from kvkeep.router.events.source_counters import SourceCounters

REPLAY_TIMEOUT_S = 2.0
"""An engine looks for questions every 0.1 s when idle, and between two batches otherwise."""
REPLAY_BATCHES_MAX = 20_000
"""vLLM keeps 10,000 by default."""
FORGET_S = 30.0
"""What is known of an engine that was not heard for so long is worth nothing, and takes room."""
APPLIED_AT_ONCE = 512
"""Blocks taken before requests get a turn: about a millisecond of work."""


class TakesEvents(Protocol):
    """What a source feeds."""

    def apply(self, endpoint: str, event: BlockEvent) -> None:
        """Somebody said what is stored there, or no more."""
        ...

    def drop(self, endpoint: str) -> None:
        """Nothing is known of it any more."""
        ...


class Told(NamedTuple):
    """A message."""

    number: int
    payload: bytes
    run: str = ""
    """Changes when numbers begin anew, where that is told."""


class Follower:
    """Feeds a table with what one publisher tells; how it is reached is a subclass's business."""

    can_ask = True
    """Whether lost messages can be asked for."""

    def __init__(self, endpoint: str, table: TakesEvents, clock: Clock | None = None) -> None:
        """Know nothing; nothing is opened.

        Args:
            endpoint: The publisher's name in the table.
            table: What to feed.
            clock: Tells how long the publisher was out of reach.
        """
        self._endpoint, self._table = endpoint, table
        self._clock = clock or SystemClock()
        self._next = 0
        self._run = ""
        self._newest_ts = 0.0
        self._last_digest = 0
        """Of the batch before the next: who can repeat it is the publisher that was known."""
        self.lost_at_s: float | None = None
        """Since when what is known can't be renewed; None if it can, or nothing is known."""
        self.is_connected = False
        self.counters = SourceCounters()

    @abstractmethod
    def ask(self, first: int) -> AsyncGenerator[Told, None]:
        """Ask for all messages from a number on that are still to be had, in order."""
        ...

    # ---- the connection

    def lost(self) -> None:
        """The connection is gone."""
        if not self.is_connected:
            return
        self.is_connected = False
        self.counters.num_losses += 1
        if not self.can_ask:
            # Nobody can say what was missed, nor whether it is the same engine that comes back.
            self.forget(0)
        elif self._next:
            self.lost_at_s = self._clock.now_s()

    async def found(self) -> None:
        """The connection is there, or there again: take what was missed."""
        self.is_connected = True
        if not self.can_ask:
            return
        if self._next:
            before, self._next = self._next, self._next - 1
            if not await self.replay(self._last_digest):
                self._next = before
                self.forget(0)
        self.lost_at_s = None
        if not self._next:
            await self.replay()

    def look(self) -> None:
        """Forget what could not be renewed for too long."""
        if self.lost_at_s is not None and self._clock.now_s() - self.lost_at_s > FORGET_S:
            self.forget(0)

    async def replay(self, last_digest: int | None = None) -> bool:
        """Ask for everything from the next number on, and take it; stop at what is missing.

        Args:
            last_digest: Take nothing unless the first batch that comes is this one.

        Returns:
            Whether it was; True if that did not matter.
        """
        is_sure = last_digest is None
        if not self.can_ask:
            return is_sure
        num_left = REPLAY_BATCHES_MAX
        try:
            async with (
                asyncio.timeout(REPLAY_TIMEOUT_S),
                contextlib.aclosing(self.ask(self._next)) as answers,
            ):
                async for told in answers:
                    if is_sure:
                        await self._take_replayed(told)
                    elif told.number != self._next or digest_of(told.payload) != last_digest:
                        return False
                    else:
                        is_sure = True
                        self._next += 1
                    num_left -= 1
                    if not num_left:
                        break
        except TimeoutError:
            pass
        return is_sure

    # ---- messages

    async def heard(self, told: Told) -> None:
        """Take a message that came by itself."""
        batch = _decode(told.payload)
        number = told.number
        if told.run != self._run:
            self._begin_run(told)
        elif number < self._next:
            if batch is None or batch.ts <= self._newest_ts:
                # It was replayed before its turn in the queue came.
                return
            # The engine started anew, and counts from 0 again.
            self.forget(0)
        if number > self._next:
            self.counters.num_gaps += 1
            await self.replay()
            if number < self._next:
                return
            if number > self._next:
                self.forget(number)
        self._next = number + 1
        self._last_digest = digest_of(told.payload)
        await self._take(batch)

    async def _take_replayed(self, told: Told) -> None:
        number = told.number
        if told.run != self._run:
            self._begin_run(told)
        if number < self._next:
            return
        if number > self._next:
            # Its buffer does not reach back far enough.
            self.forget(number)
        self._next = number + 1
        self._last_digest = digest_of(told.payload)
        self.counters.num_replayed += 1
        await self._take(_decode(told.payload))

    def _begin_run(self, told: Told) -> None:
        if self._next:
            self.forget(0)
        self._run = told.run

    async def _take(self, batch: EventBatch | None) -> None:
        if batch is None:
            # Whatever it said is lost, and a removal may be among it.
            self.counters.num_refused += 1
            self.forget(self._next)
            return
        self.counters.num_batches += 1
        self._newest_ts = max(self._newest_ts, batch.ts)
        num_blocks = 0
        for event in batch.events:
            self._table.apply(self._endpoint, event)
            num_blocks += len(event.block_hashes) if isinstance(event, BlockStored) else 1
            if num_blocks > APPLIED_AT_ONCE:
                # Requests are relayed by the same thread.
                num_blocks = 0
                await asyncio.sleep(0)

    def forget(self, next_number: int) -> None:
        """Forget everything; go on with this number."""
        self._table.drop(self._endpoint)
        self._next = next_number
        self.lost_at_s = None
        self.counters.num_dropped += 1


def _decode(payload: bytes) -> EventBatch | None:
    try:
        return decode_batch(payload)
    except ValueError:
        return None


def digest_of(payload: bytes) -> int:
    """Tells batches apart."""
    return xxhash.xxh3_64_intdigest(payload)
