"""From the pool down: blocks that became readable are copied to the tiers that want them.

A block waits here by its key alone and is pinned only while it is copied, so a slow tier costs
nothing but its own blocks: what is evicted before its turn is counted and was only a cache.
"""

import asyncio
import itertools
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence

from kvkeep.core import effects as do
from kvkeep.core import events as on
from kvkeep.core.node import TIERS_SESSION
from kvkeep.daemon.movement.lower_tier import LowerTier
from kvkeep.daemon.movement.slots import all_parts
from kvkeep.daemon.recovery import SlotVerifier
from kvkeep.daemon.shell import Shell
from kvkeep.model.errors import UnavailableError
from kvkeep.model.ids import BlockKey, Holder, LeaseId
from kvkeep.tiers.shared_memory import PoolView

log = logging.getLogger(__name__)

BATCH_BYTES = 16 << 20
BATCHES_MAX = 4
"""In motion at once: 64 MiB pinned, whatever the pool's size; a pool is never smaller than 16 MiB
and then moves one block at a time."""
LEAVE_S = 30.0
"""Copies that have begun when a tier is to be cleared are waited for so long."""
PINNED_SHARE_MAX = 0.25
"""Of the pool's slots, at most this share is pinned for cascades."""

Copy = tuple[BlockKey, int, Sequence[LowerTier]]
"""A block, its slot, and where it is to go."""


class Cascade:
    """Copies downwards. Runs on the event loop's thread; the copying itself is the tiers'."""

    def __init__(
        self,
        shell: Shell,
        tiers: Sequence[LowerTier],
        view: PoolView,
        count: Callable[[str, int], None],
    ) -> None:
        self._shell = shell
        self._tiers = tiers
        self._view = view
        self._verifier = SlotVerifier(view)
        self._count = count
        self._holder = Holder(TIERS_SESSION, os.getpid())
        self._waiting: OrderedDict[BlockKey, list[LowerTier]] = OrderedDict()
        """Blocks and the tiers that admitted them; no more than there are slots."""
        self._copying: dict[BlockKey, list[LowerTier]] = {}
        """Blocks on their way, and where to: used again meanwhile, they are not admitted a second
        time."""
        self._is_over = self._is_abandoned = False
        self._running: set[asyncio.Task[None]] = set()
        geometry = view.geometry
        pinnable = max(1, int(geometry.num_slots * PINNED_SHARE_MAX))
        self._batch_blocks = max(
            1, min(BATCH_BYTES // geometry.layout.block_bytes, pinnable // BATCHES_MAX)
        )

    @property
    def num_waiting(self) -> int:
        """Blocks that wait for their turn."""
        return len(self._waiting)

    def ready(
        self,
        keys: Sequence[BlockKey],
        tiers: Sequence[LowerTier] | None = None,
        *,
        are_uses: bool = True,
    ) -> None:
        """These blocks became readable in the pool.

        Args:
            keys: Of the blocks.
            tiers: Those that hear of it; all if None.
            are_uses: Whether an engine uses them now, which speaks for keeping them.
        """
        if self._is_over:
            return
        for key in keys:
            for tier in (tiers or self._tiers) if are_uses else ():
                tier.seen(key)
            waiting, copying = self._waiting.get(key, ()), self._copying.get(key, ())
            wanted_by = [
                tier
                for tier in tiers or self._tiers
                if tier not in waiting and tier not in copying and tier.admits(key)
            ]
            if wanted_by:
                self._waiting[key] = [*waiting, *wanted_by]
        while len(self._waiting) > self._view.geometry.num_slots:
            self._miss(*self._waiting.popitem(last=False))
        self._begin()

    def _miss(self, key: BlockKey, tiers: Sequence[LowerTier]) -> None:
        """A block was evicted, or pushed out of the queue, before its turn."""
        self._count("cascades_too_late", 1)
        for tier in tiers:
            tier.give_up(key)

    def _begin(self) -> None:
        while not self._is_over and self._waiting and len(self._running) < BATCHES_MAX:
            keys = list(itertools.islice(self._waiting, self._batch_blocks))
            wanted_by = [self._waiting.pop(key) for key in keys]
            reply = self._shell.handle(on.BlocksAsked(0, self._holder, keys, float("inf")))
            if not isinstance(reply, do.ReplyRead):
                return
            found: list[Copy] = []
            for key, slot, tiers in zip(keys, reply.slots, wanted_by, strict=True):
                if slot == do.NO_SLOT:
                    self._miss(key, tiers)
                else:
                    found.append((key, slot, tiers))
                    self._copying[key] = [*self._copying.get(key, ()), *tiers]
            if found:
                task = asyncio.get_running_loop().create_task(self._copy(reply.lease_id, found))
                self._running.add(task)
                task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.result()  # a defect goes to the loop's handler
            self._begin()

    async def _copy(self, lease_id: LeaseId, blocks: Sequence[Copy]) -> None:
        try:
            slots = [slot for _, slot, _ in blocks]
            intact = await asyncio.to_thread(self._verifier.find_intact, slots)
            for key, slot, tiers in blocks:
                if slot not in intact:
                    self._shell.handle(
                        on.BlocksFoundCorrupt(key.namespace, key.group_idx, [key.block_hash])
                    )
                    self._miss(key, tiers)
            good = [copy for copy in blocks if copy[1] in intact]
            # One that opened meanwhile is among them, and no block here is for it.
            await asyncio.gather(*(self._copy_to(tier, good) for tier in self._tiers))
        finally:
            for key, _, tiers in blocks:
                self._arrived(key, tiers)
            # After a call that hangs at the daemon's end nothing is changed any more.
            if not self._is_abandoned:
                self._shell.handle(on.ReadFinished(self._holder, [lease_id]))

    def _arrived(self, key: BlockKey, tiers: Sequence[LowerTier]) -> None:
        """A block is on its way to these tiers no more."""
        left = [tier for tier in self._copying.pop(key) if tier not in tiers]
        if left:
            self._copying[key] = left

    async def _copy_to(self, tier: LowerTier, blocks: Sequence[Copy]) -> None:
        wanted = [(key, slot) for key, slot, tiers in blocks if tier in tiers]
        if not wanted:
            return
        for start in range(0, len(wanted), tier.batch_blocks):
            batch = wanted[start : start + tier.batch_blocks]
            keys = [key for key, _ in batch]
            try:
                kept = await tier.write(keys, all_parts(self._view, [slot for _, slot in batch]))
            except UnavailableError as error:
                log.warning(
                    "cascade refused. tier=%s blocks=%d reason=%s",
                    tier.name,
                    len(keys),
                    str(error),
                )
                self._count("cascades_refused", len(keys))
            else:
                self._count("blocks_cascaded", sum(kept))

    async def leave(self, tiers: Sequence[LowerTier]) -> None:
        """Copy nothing of what waits to these tiers; ends when nothing is on its way to them.

        Raises:
            UnavailableError: A copy hangs; what waits is left out all the same.
        """
        for key, wanted_by in list(self._waiting.items()):
            staying = [tier for tier in wanted_by if tier not in tiers]
            for tier in wanted_by:
                if tier in tiers:
                    tier.give_up(key)
            if staying:
                self._waiting[key] = staying
            else:
                del self._waiting[key]
        if self._running:
            _, pending = await asyncio.wait(set(self._running), timeout=LEAVE_S)
            if pending:
                raise UnavailableError(f"a copy to a lower tier takes longer than {LEAVE_S:.0f} s")

    def stop(self) -> None:
        """Begin nothing more; what waits is dropped."""
        self._is_over = True
        while self._waiting:
            self._miss(*self._waiting.popitem())

    async def drain(self, timeout_s: float) -> None:
        """Wait until what is in motion has ended."""
        if self._running:
            await asyncio.wait(set(self._running), timeout=timeout_s)

    def abandon(self) -> None:
        """The daemon ends: what still hangs changes nothing any more."""
        self._is_abandoned = True
