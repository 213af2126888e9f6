"""The event sources of a whole fleet: one task for each engine that publishes, as long as it is in.

Told of engines as policies are (``joined`` and ``left``), on the event loop's thread.
"""

import asyncio
import logging

import zmq

from kvkeep.model.clock import Clock
from kvkeep.router.events.settings import EngineEvents
from kvkeep.router.events.source_counters import SourceCounters
from kvkeep.router.events.zmq_source import ZmqAddress, ZmqSource
from kvkeep.router.prefix_index import PrefixIndex
from kvkeep.router.snapshot import Endpoint

log = logging.getLogger(__name__)


def address_of(endpoint: Endpoint, default: EngineEvents) -> ZmqAddress | None:
    """Return where an engine publishes; None if it does not."""
    said = default if endpoint.events is None else endpoint.events
    if not said.publish:
        return None
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    return ZmqAddress(
        said.publish.replace("{host}", host),
        said.replay.replace("{host}", host) or None,
        said.topic,
        said.bind,
    )


class EventFeeds:
    """Feeds an index with the events of every engine that publishes."""

    def __init__(self, default: EngineEvents, index: PrefixIndex, clock: Clock) -> None:
        """Listen to nobody.

        Args:
            default: Where engines publish that don't say so themselves.
            index: What to feed.
            clock: Tells how long an engine was out of reach.
        """
        self._default, self._index, self._clock = default, index, clock
        self._sources: dict[str, tuple[ZmqSource, asyncio.Task[None]]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._past = SourceCounters()

    def joined(self, endpoint: Endpoint) -> None:
        """Listen to an engine; a loop is running."""
        address = address_of(endpoint, self._default)
        if address is None:
            return
        self.left(endpoint)
        name = endpoint.name
        source = ZmqSource(name, address, self._index, self._clock)
        task = asyncio.get_running_loop().create_task(source.run())
        task.add_done_callback(lambda done: self._ended(name, address, done))
        self._sources[name] = source, task

    def left(self, endpoint: Endpoint) -> None:
        """Listen no more."""
        found = self._sources.pop(endpoint.name, None)
        if found is None:
            return
        source, task = found
        self._past = self._past.plus(source.counters)
        # Kept until it has closed its sockets.
        self._ending.add(task)
        task.cancel()

    @property
    def counters(self) -> SourceCounters:
        """What became of all messages, those of engines that left among them."""
        total = self._past
        for source, _ in self._sources.values():
            total = total.plus(source.counters)
        return total

    def is_heard(self, name: str) -> bool:
        """Whether an engine's publisher is connected."""
        found = self._sources.get(name)
        return found is not None and found[0].is_connected

    @property
    def num_heard(self) -> int:
        """Engines whose publisher is connected."""
        return sum(source.is_connected for source, _ in self._sources.values())

    def _ended(self, name: str, address: ZmqAddress, task: asyncio.Task[None]) -> None:
        self._ending.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        # Whatever it was, the fleet is routed without this engine's events.
        self._index.drop(name)
        log.error("events of %s at %s are not heard any more: %s", name, address.events, error)
        if error is not None and not isinstance(error, zmq.ZMQError):
            raise error

    async def close(self) -> None:
        """Stop listening to all; afterwards no socket is open."""
        tasks = [*(task for _, task in self._sources.values()), *self._ending]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._sources.clear()
