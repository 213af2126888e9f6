"""The event sources of a whole fleet: one task for each engine that publishes, as long as it is in.

Told of engines as policies are (``joined`` and ``left``), on the event loop's thread.
"""

import asyncio
import logging
from typing import Annotated

import msgspec
import zmq

from kvkeep.router.events.zmq_source import SourceCounters, ZmqAddress, ZmqSource
from kvkeep.router.prefix_index import PrefixIndex
from kvkeep.router.snapshot import Endpoint

log = logging.getLogger(__name__)

ENGINES_MAX = 1024
Address = Annotated[str, msgspec.Meta(max_length=256, pattern=r"^(tcp://[^\s]+:[^\s]+)?$")]


class EngineEvents(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where one engine publishes, or all of them."""

    events: Address = ""
    """``endpoint`` of the engine's ``--kv-events-config`` as seen from the router, for example
    tcp://10.0.0.1:5557; ``{host}`` stands for the engine's host. Empty: it does not publish."""
    replay: Address = ""
    """Its ``replay_endpoint``. Empty: lost events are not asked for again, and what was known of
    the engine is forgotten instead."""
    topic: Annotated[str, msgspec.Meta(max_length=256)] = ""
    """Beginning of the topics to listen to."""
    bind: bool = False
    """The engine connects to the router: it does so if its ``endpoint`` has no ``*``."""


class EventSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the engines of a fleet publish."""

    default: EngineEvents = EngineEvents()
    """Of engines that are not named."""
    engines: Annotated[dict[str, EngineEvents], msgspec.Meta(max_length=ENGINES_MAX)] = {}
    """By the engine's name."""

    def address_of(self, endpoint: Endpoint) -> ZmqAddress | None:
        """Return where an engine publishes; None if it does not."""
        said = self.engines.get(endpoint.name, self.default)
        if not said.events:
            return None
        host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        return ZmqAddress(
            said.events.replace("{host}", host),
            said.replay.replace("{host}", host) or None,
            said.topic,
            said.bind,
        )


class EventFeeds:
    """Feeds an index with the events of every engine that publishes."""

    def __init__(self, settings: EventSettings, index: PrefixIndex) -> None:
        self._settings, self._index = settings, index
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self.counters: dict[str, SourceCounters] = {}
        """By engine: what became of its events, since it joined."""

    def joined(self, endpoint: Endpoint) -> None:
        """Listen to an engine; a loop is running."""
        address = self._settings.address_of(endpoint)
        if address is None:
            return
        self.left(endpoint)
        source = ZmqSource(endpoint.name, address, self._index)
        task = asyncio.get_running_loop().create_task(source.run())
        task.add_done_callback(lambda done: self._ended(endpoint.name, address, done))
        self._tasks[endpoint.name] = task
        self.counters[endpoint.name] = source.counters

    def left(self, endpoint: Endpoint) -> None:
        """Listen no more."""
        task = self._tasks.pop(endpoint.name, None)
        self.counters.pop(endpoint.name, None)
        if task is not None:
            # Kept until it has closed its sockets.
            self._ending.add(task)
            task.cancel()

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
        tasks = [*self._tasks.values(), *self._ending]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()
        self.counters.clear()
