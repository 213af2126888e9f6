"""The only mutator of the core: event in, effects carried out.

Runs on the event loop's thread. Effects on the pool are memory writes; replies are handed to the
sessions' own writers; watching a process costs one descriptor (pidfd_open, Linux 5.3).
"""

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Protocol

from kvkeep.core import effects as do
from kvkeep.core import events as on
from kvkeep.core.blocks import BlockState
from kvkeep.core.eviction.base import EvictionPolicy
from kvkeep.core.eviction.lru import LruPolicy
from kvkeep.core.node import NodeState
from kvkeep.core.quotas import make_accounts
from kvkeep.model.clock import Clock
from kvkeep.model.errors import InvariantError, RefusedError
from kvkeep.model.ids import UNKNOWN_PID, BlockKey, Holder
from kvkeep.model.layout import KvLayout
from kvkeep.tiers.shared_memory import PoolFile
from kvkeep.tiers.slot_header import SlotState

log = logging.getLogger(__name__)

Reply = do.ReplyRead | do.ReplyStore | do.ReplyStored | do.ReplyCleared


class Watches(Protocol):
    """Who follows what the pool holds."""

    def ready(self, slot: int, key: BlockKey) -> None:
        """A block became readable."""
        ...

    def freed(self, slot: int) -> None:
        """A slot is empty."""
        ...

    def emptied(self) -> None:
        """Every slot is."""
        ...


class Shell:
    """Owns the pool file and the node's state; nothing else writes either."""

    def __init__(
        self,
        pool: PoolFile,
        clock: Clock,
        new_policy: Callable[[int], EvictionPolicy] | None = None,
        quotas: Mapping[str, float] | None = None,
    ) -> None:
        """Take a pool.

        Args:
            pool: Nobody else marks its slots.
            clock: Monotonic.
            new_policy: Given the number of slots, makes what orders eviction; LRU if None.
            quotas: Shares of the pool by tenant.
        """
        self.pool = pool
        self._quotas = quotas or {}
        self._new_policy = new_policy
        self.node: NodeState | None = None
        self._clock = clock
        self._watched: dict[int, int] = {}
        """Descriptors of the processes waited for, by pid."""
        self._writers: set[int] = set()
        self._workers: dict[int, dict[str, set[int]]] = {}
        """Sessions of each engine's workers by process, until the engine greets or that ends."""
        """Processes that may be writing; the pool lists them for a daemon after this one."""
        self._is_broken = False
        """The core failed: nothing is lent, and the pool stays as it is for the next daemon."""
        self.ready_keys: list[BlockKey] = []
        """Blocks that the last event made readable."""
        self.watcher: Watches | None = None
        """Told of what becomes readable and what is gone; set before the pool is recovered."""
        self.num_workers = 0
        """Sessions of workers; while there is one, the pool keeps its layout."""

    def open_layout(self, layout: KvLayout) -> None:
        """Make the pool fit for this layout, or find that it does.

        Raises:
            RefusedError: The pool holds blocks, or serves engines, of another layout.
            InputError: No two blocks of this layout fit.
        """
        geometry = self.pool.geometry
        if self._is_broken:
            raise RefusedError("this daemon is about to end after a defect: try again soon")
        if geometry is not None and geometry.layout == layout and self.node is not None:
            return
        if geometry is not None and geometry.layout != layout and self.node is not None:
            # A fenced slot counts: its writer would go on at places that mean something else.
            ledger = self.node.ledger
            if self.num_workers or ledger.num_free < len(ledger.slots):
                raise RefusedError(
                    "this engine's blocks differ from those in the pool "
                    f"({layout.difference(geometry.layout)}): start it with the same settings, "
                    "or give it a daemon of its own"
                )
        self.pool.format(layout)
        self._begin_node()

    def _begin_node(self) -> None:
        geometry = self.pool.geometry
        assert geometry is not None
        num_slots, make = geometry.num_slots, self._new_policy or (lambda _: LruPolicy())
        tenants = make_accounts(num_slots, self._quotas, make)
        self.node = NodeState(num_slots, geometry.layout.num_heads, make(num_slots), tenants)
        if self.watcher is not None:
            self.watcher.emptied()

    def recover(self, find_intact: Callable[[Sequence[int]], Set[int]]) -> tuple[int, int]:
        """Rebuild the ledger from the headers of a pool that an earlier daemon left.

        Args:
            find_intact: Which of the given slots hold bytes that match their digests.

        Returns:
            Blocks taken over, and blocks found torn or rotten and dropped.
        """
        if self.pool.geometry is None:
            return 0, 0
        self._begin_node()
        assert self.node is not None
        found = list(self.pool.scan())
        intact = find_intact([slot for slot, h in found if h and h.state is SlotState.READY])
        num_dropped = 0
        writers = self.pool.find_writers()
        for slot, header in found:
            if header is not None and header.state is SlotState.WRITING:
                # Several ranks fill one slot; which ones, its header can't say.
                for pid in writers if header.pid == UNKNOWN_PID else [header.pid]:
                    self.handle(on.WriteRecovered(slot, pid))
                if header.pid == os.getpid():
                    # An earlier daemon's own promotion, and its number is this one's now, as in a
                    # container where both are process 1: it is over, and must not be waited for.
                    self.handle(on.HolderQuiet(header.pid))
            elif header is not None and header.key is not None and slot in intact:
                self.handle(on.BlockRecovered(header.key, slot))
                if self.watcher is not None:
                    self.watcher.ready(slot, header.key)
            else:
                self.pool.mark(slot, SlotState.FREE, None)
                num_dropped += 1
        self.node.check()
        return self.node.ledger.num_by_state[BlockState.READY], num_dropped

    def handle(self, event: on.Event) -> Reply | None:
        """Feed the core one event and carry out its effects; return the reply, if it has one.

        Raises:
            InvariantError: The core failed; from now on nothing is lent any more.
        """
        node = self.node
        if node is None:
            return None
        self.ready_keys = []
        try:
            return self._advance(node, event)
        except Exception as error:
            self.node = None
            self._is_broken = True
            raise InvariantError(f"event failed. event={type(event).__name__}") from error

    def _advance(self, node: NodeState, event: on.Event) -> Reply | None:
        reply: Reply | None = None
        for effect in node.handle(event, now_s=self._clock.now_s()):
            if isinstance(effect, Reply):
                reply = effect
            else:
                self._carry_out(effect)
        return reply

    def _carry_out(
        self, effect: do.MarkWriting | do.MarkReady | do.MarkFree | do.WatchProcess
    ) -> None:
        match effect:
            case do.MarkReady(slot, key):
                self.pool.mark(slot, SlotState.READY, key)
                self.ready_keys.append(key)
                if self.watcher is not None:
                    self.watcher.ready(slot, key)
            case do.MarkWriting(slot, key, lease_id, pid):
                self.pool.mark(slot, SlotState.WRITING, key, lease_id=lease_id, pid=pid)
            case do.MarkFree(slot):
                self.pool.mark(slot, SlotState.FREE, None)
                if self.watcher is not None:
                    self.watcher.freed(slot)
            case do.WatchProcess(pid):
                self.watch(pid)

    # ---- processes

    def add_writer(self, pid: int) -> None:
        """Take note of a worker before it is lent anything."""
        self._writers.add(pid)
        self.pool.note_writers(self._writers)
        if pid != UNKNOWN_PID:
            self.watch(pid)

    def greeted(self, holder: Holder, engine_id: str, *, is_for_process: bool) -> None:
        """Take note of a worker before it is lent anything; a greeting is also a proof.

        Args:
            holder: The worker's session.
            engine_id: Of the worker.
            is_for_process: No copy of the whole process is in motion; else none of this engine's.
        """
        if holder.pid != UNKNOWN_PID:
            engines = self._workers.setdefault(holder.pid, {})
            earlier = None if is_for_process else frozenset(engines.get(engine_id, ()))
            if is_for_process:
                engines.clear()
            engines[engine_id] = {holder.session_id}
            self.handle(on.HolderQuiet(holder.pid, holder.session_id, earlier))
        self.add_writer(holder.pid)

    def watch(self, pid: int) -> None:
        """Wait for the end of a process, which proves that it writes no more.

        A worker is watched from its greeting on: later its number may be another process's.
        """
        if pid in self._watched:
            return
        loop = asyncio.get_running_loop()
        try:
            fd = os.pidfd_open(pid)
        except (OverflowError, OSError) as error:
            # No process has a number that no process can have.
            if isinstance(error, ProcessLookupError | OverflowError):
                loop.call_soon(self._quiet, pid)
            else:
                # Without pidfd nothing proves quiet; the slots stay fenced until a restart.
                log.warning("process can't be watched. pid=%d error=%s", pid, error)
            return
        self._watched[pid] = fd
        loop.add_reader(fd, self._died, pid)

    def _died(self, pid: int) -> None:
        fd = self._watched.pop(pid)
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)
        self._quiet(pid)

    def _quiet(self, pid: int) -> None:
        log.info("process has ended. pid=%d", pid)
        self._writers.discard(pid)
        self._workers.pop(pid, None)
        self.pool.note_writers(self._writers)
        self.handle(on.HolderQuiet(pid))

    def close(self) -> None:
        """Stop watching and give the pool back; its blocks stay for the next daemon."""
        for fd in self._watched.values():
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)
        self._watched.clear()
        self.pool.close()
