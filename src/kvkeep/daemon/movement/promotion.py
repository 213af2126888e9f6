"""From a lower tier up: blocks that a request waits for are read into slots of the pool.

What is on its way is never abandoned: a read that comes too late for its request still ends in its
slots, and only then are they readable or free. The request is answered at its time with what is
there. A block that is on its way already is waited for, not read twice.
"""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from kvkeep.core import effects as do
from kvkeep.core import events as on
from kvkeep.core.node import NO_LEASE, TIERS_SESSION
from kvkeep.daemon.movement.lower_tier import LowerTier
from kvkeep.daemon.movement.pace import Pace
from kvkeep.daemon.movement.slots import all_parts, value_bytes
from kvkeep.daemon.shell import Shell
from kvkeep.model.clock import Clock
from kvkeep.model.errors import UnavailableError
from kvkeep.model.ids import BlockHash, BlockKey, Holder, LeaseId, Namespace
from kvkeep.tiers.shared_memory import PoolView

log = logging.getLogger(__name__)

POOL_SHARE_MAX = 0.9
"""Of the pool's slots, at most this share is filled for one request."""


Granted = tuple[BlockKey, int, LowerTier]
"""A block, the slot that it is read into, and where from."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one request asks for."""

    namespace: Namespace
    group_idx: int
    hashes: Sequence[BlockHash]
    prefill_tokens_s: float
    """Of the engine that asks; 0 if it does not know."""

    def keys(self, first: int, end: int | None = None) -> list[BlockKey]:
        """Keys of the blocks from ``first`` on."""
        return [BlockKey(self.namespace, h, self.group_idx) for h in self.hashes[first:end]]


@dataclass(frozen=True, slots=True)
class Arrival:
    """Blocks on their way together."""

    ended: "asyncio.Future[None]"
    until_s: float
    """By the loop's clock: when whoever asked for them gives up."""
    tiers: Sequence[LowerTier]
    """Where they come from."""

    def is_awaited(self, now_s: float) -> bool:
        """Whether it is still worth waiting for: what is late may never come."""
        return now_s < self.until_s and not any(tier.is_still for tier in self.tiers)


class Promotion:
    """Copies upwards. Runs on the event loop's thread; the copying itself is the tiers'."""

    def __init__(
        self,
        shell: Shell,
        tiers: Sequence[LowerTier],
        view: PoolView,
        pace: Pace,
        clock: Clock,
        count: Callable[[str, int], None],
    ) -> None:
        self._shell = shell
        self._tiers = tiers
        self._view = view
        self._pace = pace
        self._clock = clock
        self._count = count
        self._holder = Holder(TIERS_SESSION, os.getpid())
        self._arriving: dict[BlockKey, Arrival] = {}
        self._reading: set[asyncio.Task[None]] = set()
        self._is_over = self._is_abandoned = False
        self._blocks_max = max(1, int(view.geometry.num_slots * POOL_SHARE_MAX))

    def may_come(self, wanted: Wanted, num_ready: int) -> bool:
        """Whether it may be worth waiting for more than the leading ``num_ready`` blocks."""
        if self._is_over or num_ready >= len(wanted.hashes):
            return False
        (key,) = wanted.keys(num_ready, num_ready + 1)
        arrival = self._arriving.get(key)
        if arrival is not None:
            return arrival.is_awaited(asyncio.get_running_loop().time())
        size = (num_ready, len(wanted.hashes))
        return any(
            tier.may_have(key) and self._pace.may_pay(*size, tier, wanted.prefill_tokens_s)
            for tier in self._tiers
        )

    def hold(self, wanted: Wanted, num_ready: int) -> LeaseId:
        """Keep the readable head of a prefix that no engine was lent; returns a lease."""
        if not num_ready:
            return NO_LEASE
        event = on.BlocksAsked(0, self._holder, wanted.keys(0, num_ready), float("inf"))
        reply = self._shell.handle(event)
        return reply.lease_id if isinstance(reply, do.ReplyRead) else NO_LEASE

    def let_go(self, lease_id: LeaseId) -> None:
        """Undo ``hold``."""
        if lease_id:
            self._shell.handle(on.ReadFinished(self._holder, [lease_id]))

    async def bring(self, wanted: Wanted, announce: Callable[[float], None]) -> None:
        """Bring as much of a prefix into the pool as is worth it.

        Args:
            wanted: The whole prefix, with what is in the pool already.
            announce: Called with the seconds that it may take, whenever that is known anew.
        """
        num_before = -1
        runs: list[tuple[LowerTier, int]] = []
        while not self._is_over:
            num_ready = self.num_ready(wanted)
            if num_ready >= len(wanted.hashes):
                return
            (first,) = wanted.keys(num_ready, num_ready + 1)
            if first not in self._arriving:
                if num_ready <= num_before:
                    return  # what was tried brought nothing
                num_before = num_ready
                runs = await self._locate(wanted, num_ready)
                if self.num_ready(wanted) != num_ready:
                    continue
            # While this one looked, another may have begun to read the same.
            arrival = self._arriving.get(first) or self._fetch(wanted, num_ready, runs)
            if arrival is None or not arrival.is_awaited(asyncio.get_running_loop().time()):
                return
            announce(arrival.until_s - asyncio.get_running_loop().time())
            await asyncio.shield(arrival.ended)

    def num_ready(self, wanted: Wanted) -> int:
        """Leading blocks that are readable now."""
        node = self._shell.node
        if node is None:
            return 0
        hashes = wanted.hashes
        return len(node.ledger.readable_prefix(wanted.namespace, wanted.group_idx, hashes))

    async def _locate(self, wanted: Wanted, first: int) -> list[tuple[LowerTier, int]]:
        """Where the blocks from ``first`` on lie: runs of one tier each, up to the first gap."""
        keys = wanted.keys(first, first + self._blocks_max)
        where: list[LowerTier | None] = [None] * len(keys)
        for tier in tuple(self._tiers):  # another may open meanwhile
            missing = [idx for idx, found in enumerate(where) if found is None]
            if not missing:
                break
            found = await tier.probe([keys[idx] for idx in missing])
            for idx, is_there in zip(missing, found, strict=True):
                if is_there:
                    where[idx] = tier
        runs: list[tuple[LowerTier, int]] = []
        for tier_or_none in where:
            if tier_or_none is None:
                break
            if runs and runs[-1][0] is tier_or_none:
                runs[-1] = (tier_or_none, runs[-1][1] + 1)
            else:
                runs.append((tier_or_none, 1))
        return runs

    def _fetch(
        self, wanted: Wanted, first: int, runs: Sequence[tuple[LowerTier, int]]
    ) -> Arrival | None:
        """Begin to read what is worth it; None if nothing is, or there is no room."""
        pacing = self._pace.plan(first, len(wanted.hashes), runs, wanted.prefill_tokens_s)
        if not pacing.num_blocks:
            return None
        keys = wanted.keys(first, first + pacing.num_blocks)
        sources: list[LowerTier] = []
        for tier, length in runs:
            sources += [tier] * length
        node = self._shell.node
        if node is None or self._is_over:
            return None
        reply = self._shell.handle(
            on.StoreAsked(
                0, self._holder, wanted.namespace, wanted.group_idx,
                [key.block_hash for key in keys], node.ledger.all_heads, float("inf"),
            )
        )  # fmt: skip
        if not isinstance(reply, do.ReplyStore) or not reply.lease_id:
            return None
        granted = [
            (key, slot, source)
            for key, slot, source in zip(keys, reply.slots, sources, strict=False)
            if slot != do.NO_SLOT
        ]
        loop = asyncio.get_running_loop()
        arrival = Arrival(
            loop.create_future(),
            loop.time() + pacing.limit_s,
            [tier for tier, _ in runs],
        )
        for key, _, _ in granted:
            self._arriving[key] = arrival
        task = loop.create_task(self._read(reply.lease_id, granted, arrival))
        self._reading.add(task)
        task.add_done_callback(self._ended)
        return arrival

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._reading.discard(task)
        if not task.cancelled():
            task.result()  # a defect goes to the loop's handler

    async def _read(
        self,
        lease_id: LeaseId,
        granted: Sequence[Granted],
        arrival: Arrival,
    ) -> None:
        """Fill the slots; ends only when every read has really ended."""
        is_stored = [False] * len(granted)
        try:
            with self._measured(granted, is_stored):
                batches = _batches(granted)
                await asyncio.gather(*(self._read_batch(granted, b, is_stored) for b in batches))
        finally:
            for key, _, _ in granted:
                self._arriving.pop(key, None)
            arrival.ended.set_result(None)
            # A read that hangs at the daemon's end may still write: its slots stay what they are.
            if not self._is_abandoned:
                self._shell.handle(on.StoreFinished(0, self._holder, lease_id, is_stored))
                self._count("promotions_failed", is_stored.count(False))

    @contextmanager
    def _measured(self, granted: Sequence[Granted], is_stored: Sequence[bool]) -> Iterator[None]:
        """Tell the pace how long the tiers took; a time counts where it is one tier's alone."""
        names = Counter(tier.name for _, _, tier in granted)
        block_bytes = self._view.geometry.layout.block_bytes
        is_alone = len(names) == 1 and all(self._pace.is_alone(name) for name in names)
        for name, num_blocks in names.items():
            self._pace.begun(name, num_blocks * block_bytes)
        begun_s = self._clock.now_s()
        try:
            yield
        finally:
            seconds = self._clock.now_s() - begun_s
            is_measured = is_alone and all(is_stored)
            for name, num_blocks in names.items():
                self._pace.ended(name, num_blocks * block_bytes, seconds if is_measured else None)

    async def _read_batch(
        self,
        granted: Sequence[Granted],
        batch: Sequence[int],
        is_stored: list[bool],
    ) -> None:
        """Read some blocks of one tier."""
        tier = granted[batch[0]][2]
        keys = [granted[idx][0] for idx in batch]
        into = all_parts(self._view, [granted[idx][1] for idx in batch])
        try:
            lengths = await tier.read(keys, into)
        except UnavailableError as error:
            log.warning("promotion failed. tier=%s reason=%s", tier.name, str(error))
            return
        for idx, length in zip(batch, lengths, strict=True):
            is_stored[idx] = length == value_bytes(self._view)

    def stop(self) -> None:
        """Begin nothing more."""
        self._is_over = True

    async def drain(self, timeout_s: float) -> None:
        """Wait for the reads in motion."""
        if self._reading:
            await asyncio.wait(set(self._reading), timeout=timeout_s)

    def abandon(self) -> None:
        """The daemon ends: what still hangs changes nothing any more."""
        self._is_abandoned = True


def _batches(granted: Sequence[Granted]) -> list[list[int]]:
    """Indices of what is read in one call each: of one tier, in the order of the prefix."""
    by_tier: dict[LowerTier, list[int]] = {}
    for idx, (_, _, tier) in enumerate(granted):
        by_tier.setdefault(tier, []).append(idx)
    return [
        mine[start : start + tier.batch_blocks]
        for tier, mine in by_tier.items()
        for start in range(0, len(mine), tier.batch_blocks)
    ]
