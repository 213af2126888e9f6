"""A worker's hold on a daemon and its pool, renewed whenever the daemon comes back."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kvkeep.client.connection import Connection
from kvkeep.client.link import Link
from kvkeep.model.errors import UnavailableError
from kvkeep.model.layout import KvLayout
from kvkeep.protocol import messages as m
from kvkeep.protocol.versions import VERSION
from kvkeep.tiers.shared_memory import PoolView

log = logging.getLogger(__name__)


@dataclass(slots=True)
class MappedPool:
    """A pool in this process, and what is known of it."""

    view: PoolView
    canary_slot: int
    connection: Connection
    """The session that lent the canary's slot."""
    generation: int = 0
    """Of that daemon."""
    is_proven: bool = False
    """The canary has passed: blocks may be loaded and stored."""


class Attachment:
    """Keeps a session with the daemon and its pool mapped.

    ``pool`` is replaced by the link's thread and read by the main and the store thread. A mapping
    stays valid after its daemon has gone.
    """

    def __init__(
        self,
        socket: str,
        layout: KvLayout,
        engine_id: str,
        prepare: Callable[[PoolView], None] = lambda pool: None,
    ) -> None:
        """Begin to look for the daemon.

        Args:
            socket: Of the daemon.
            layout: Of this engine's blocks.
            engine_id: Of this engine.
            prepare: Called with each pool before it is used, on the link's thread.
        """
        self._layout = layout
        self._engine_id = engine_id
        self._prepare = prepare
        self._quiet = threading.Lock()
        """Held while a copy to the pool runs; a greeting says that none does."""
        self.pool: MappedPool | None = None
        self.link = Link(socket, self._hello, self._opened)

    def _hello(self) -> m.Hello:
        layout = self._layout
        wire = m.Layout(layout.num_layers, layout.num_heads, layout.page_bytes,
                        layout.block_tokens, layout.dtype, layout.page_format)  # fmt: skip
        # The daemon takes a worker's greeting as proof that its earlier copies have ended. None
        # begins again before there is a connection (see ``copying``).
        with self._quiet:
            return m.Hello(VERSION, "worker", self._engine_id, wire)

    def _opened(self, connection: Connection) -> None:
        welcome = connection.welcome
        assert welcome is not None
        before = self.pool
        if before is not None and before.view.pool_id == welcome.pool_id:
            view, is_proven = before.view, before.is_proven
        else:
            view, is_proven = PoolView.open(welcome.pool_path, welcome.pool_id), False
            self._prepare(view)
        if view.geometry.layout != self._layout:
            raise UnavailableError("the pool has another layout than the daemon agreed to")
        self.pool = MappedPool(view, welcome.canary_slot, connection, welcome.generation, is_proven)

    @contextmanager
    def copying(self, connection: Connection) -> Iterator[bool]:
        """Run a copy to the pool under a lease of this session; yields whether it may begin."""
        with self._quiet:
            yield self.link.connection is connection

    def close(self) -> None:
        """End the session; the mapping ends with the process."""
        self.link.close()
