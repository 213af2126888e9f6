"""The event sources of a whole fleet: a task for each engine that publishes, as long as it is in.

And one for each daemon that engines name. Told of engines as policies are (``joined`` and
``left``), on the event loop's thread.
"""

import asyncio
import logging
from collections.abc import Sequence
from itertools import chain

import zmq

from kvkeep.model.clock import Clock
from kvkeep.model.errors import InputError
from kvkeep.router.events.following import Follower, TakesEvents
from kvkeep.router.events.nats_source import SUBJECTS, NatsAddress, NatsSource
from kvkeep.router.events.ranks import ranks_of
from kvkeep.router.events.settings import EngineEvents
from kvkeep.router.events.source_counters import SourceCounters
from kvkeep.router.events.zmq_source import ZmqAddress, ZmqSource
from kvkeep.router.prefix_index import PrefixIndex
from kvkeep.router.snapshot import Endpoint

log = logging.getLogger(__name__)

REPLAY_SUFFIX = ".replay"
"""Of a daemon's second socket."""


def addresses_of(endpoint: Endpoint, said: EngineEvents) -> Sequence[ZmqAddress | NatsAddress]:
    """Return where each rank of an engine publishes."""
    if said.publish.startswith("nats://"):
        return [NatsAddress(said.publish, said.topic or f"{SUBJECTS}.{endpoint.name}")]
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    first = ZmqAddress(
        said.publish.replace("{host}", host),
        said.replay.replace("{host}", host) or None,
        said.topic,
        said.bind,
    )
    return [first.at_rank(rank) for rank in range(said.ranks)]


class _Sources:
    """Tasks that feed one table, by the name of whom they listen to; one for each rank."""

    def __init__(self, table: TakesEvents, clock: Clock, blocks_max: int) -> None:
        self._table, self._clock, self._blocks_max = table, clock, blocks_max
        self._running: dict[str, list[tuple[Follower, asyncio.Task[None]]]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._past = SourceCounters()

    def begin(self, name: str, addresses: Sequence[ZmqAddress | NatsAddress]) -> None:
        """Listen; a loop is running."""
        self.end(name)
        tables = ranks_of(self._table, len(addresses), self._blocks_max)
        self._running[name] = [
            self._begin(name, address, table)
            for address, table in zip(addresses, tables, strict=True)
        ]

    def _begin(
        self, name: str, address: ZmqAddress | NatsAddress, table: TakesEvents
    ) -> tuple[Follower, asyncio.Task[None]]:
        source: ZmqSource | NatsSource
        if isinstance(address, NatsAddress):
            source = NatsSource(name, address, table, self._clock)
        else:
            source = ZmqSource(name, address, table, self._clock)
        task = asyncio.get_running_loop().create_task(source.run())
        task.add_done_callback(lambda done: self._ended(name, table, done))
        return source, task

    def end(self, name: str) -> None:
        """Listen no more."""
        for source, task in self._running.pop(name, ()):
            self._past = self._past.plus(source.counters)
            # Kept until it has closed its sockets.
            self._ending.add(task)
            task.cancel()

    def _ended(self, name: str, table: TakesEvents, task: asyncio.Task[None]) -> None:
        self._ending.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        # Whatever it was, the fleet is routed without these events.
        table.drop(name)
        log.error("events of %s are not heard any more: %s", name, error)
        if error is not None and not isinstance(error, zmq.ZMQError | InputError):
            raise error

    def is_running(self, name: str) -> bool:
        return name in self._running

    def is_heard(self, name: str) -> bool:
        return _is_heard(self._running.get(name, ()))

    @property
    def num_heard(self) -> int:
        return sum(map(_is_heard, self._running.values()))

    @property
    def counters(self) -> SourceCounters:
        total = self._past
        for source, _ in chain(*self._running.values()):
            total = total.plus(source.counters)
        return total

    async def close(self) -> None:
        tasks = [*(task for _, task in chain(*self._running.values())), *self._ending]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._running.clear()


def _is_heard(ranks: Sequence[tuple[Follower, asyncio.Task[None]]]) -> bool:
    return bool(ranks) and all(source.is_connected for source, _ in ranks)


class EventFeeds:
    """Feeds an index with the events of every engine that publishes, and of the daemons named."""

    def __init__(self, default: EngineEvents, index: PrefixIndex, clock: Clock) -> None:
        """Listen to nobody.

        Args:
            default: Where engines publish that don't say so themselves.
            index: What to feed.
            clock: Tells how long an engine was out of reach.
        """
        self._default, self._index = default, index
        self._engines = _Sources(index, clock, index.blocks_max)
        self._pools = _Sources(index.pools, clock, index.blocks_max)
        self._pool_of: dict[str, str] = {}

    def joined(self, endpoint: Endpoint) -> None:
        """Listen to an engine, if it publishes; a loop is running."""
        said = self._default if endpoint.events is None else endpoint.events
        if not said.publish:
            return
        self.left(endpoint)
        self._engines.begin(endpoint.name, addresses_of(endpoint, said))
        if said.pool:
            self._pool_of[endpoint.name] = said.pool
            self._index.pools.joined(endpoint.name, said.pool)
            if not self._pools.is_running(said.pool):
                address = ZmqAddress(said.pool, said.pool + REPLAY_SUFFIX)
                self._pools.begin(said.pool, [address])

    def left(self, endpoint: Endpoint) -> None:
        """Listen no more."""
        self._engines.end(endpoint.name)
        pool = self._pool_of.pop(endpoint.name, None)
        self._index.pools.left(endpoint.name)
        if pool is not None and not self._index.pools.is_used(pool):
            self._pools.end(pool)
            self._index.pools.drop(pool)

    @property
    def counters(self) -> SourceCounters:
        """What became of all messages, those of engines that left among them."""
        return self._engines.counters.plus(self._pools.counters)

    def is_heard(self, name: str) -> bool:
        """Whether an engine's publishers are connected, all of them."""
        return self._engines.is_heard(name)

    @property
    def num_heard(self) -> int:
        """Engines whose publishers are connected."""
        return self._engines.num_heard

    @property
    def num_pools_heard(self) -> int:
        """Daemons that are connected."""
        return self._pools.num_heard

    async def close(self) -> None:
        """Stop listening to all; afterwards no socket is open."""
        await self._engines.close()
        await self._pools.close()
