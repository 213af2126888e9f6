"""All that moves blocks between the pool and the tiers below it, for as long as the daemon runs.

The tiers are opened when the pool has a layout, as that decides the length of a value, and again
when it gets another. Until one is open, and where one can't be, the daemon serves without it.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence

from kvkeep.core.planner import PlanMode, PlannerSettings
from kvkeep.daemon.movement.cascade import Cascade
from kvkeep.daemon.movement.lower_tier import LowerTier
from kvkeep.daemon.movement.pace import Pace
from kvkeep.daemon.movement.promotion import Promotion, Wanted
from kvkeep.daemon.movement.proving import Reads
from kvkeep.daemon.movement.tier_set import TierSet, raise_defect
from kvkeep.daemon.settings import DaemonSettings
from kvkeep.daemon.shell import Shell
from kvkeep.model.clock import Clock
from kvkeep.model.ids import BlockKey

log = logging.getLogger(__name__)

Mover = Cascade | Promotion

DRAIN_S = 4.0
"""What is in motion when the daemon stops, or when the layout changes, is waited for so long; with
what closing tiers may take, the daemon ends in that time, whatever hangs."""
PREFETCHES_MAX = 4
"""At once: tiers are there for requests that wait first of all."""
PREFETCH_S = 30.0
"""So long after it was asked a prefetch begins no further read."""
USES_MAX = 1 << 16
"""Blocks read by engines of which admission has not heard yet; older ones are forgotten."""
USES_AT_ONCE = 64
"""Of those, so many are taken in one turn of the loop: about 0.3 ms."""


class Movement:
    """Runs on the event loop's thread."""

    def __init__(
        self,
        settings: DaemonSettings,
        shell: Shell,
        clock: Clock,
        count: Callable[[str, int], None],
    ) -> None:
        self._settings = settings
        self._shell = shell
        self._clock = clock
        self._count = count
        self._pool_id: bytes | None = None
        """Of the pool that the tiers were opened for."""
        self._set = TierSet(settings.named_tiers, clock, count)
        self.pace: Pace | None = None
        self._cascade: Cascade | None = None
        self._promotion: Promotion | None = None
        self._closing: set[asyncio.Task[None]] = set()
        """What ends the movers and tiers of former layouts."""
        self._stocks: set[asyncio.Task[None]] = set()
        self._prefetches: set[asyncio.Task[None]] = set()
        self.is_hanging = False
        """Something did not end in time when this was closed."""
        self._uses: deque[BlockKey] = deque(maxlen=USES_MAX)
        self._is_taking_uses = False

    @property
    def tiers(self) -> Sequence[LowerTier]:
        """Those that are open, the fastest first."""
        return self._set.tiers

    @property
    def closed_tiers(self) -> Mapping[str, str]:
        """Why a tier could not be opened, by its name."""
        return self._set.failed

    @property
    def opening_tiers(self) -> Sequence[str]:
        """Names of those that are being opened now."""
        return list(self._set.opening)

    # ---- opening and closing

    async def opened(self) -> None:
        """Wait until each tier is open, or known not to be."""
        self.follow()
        await self._set.opened()

    def follow(self) -> None:
        """Open the tiers for the pool's layout, if they are not; each serves when it is open."""
        pool = self._shell.pool
        if not self._settings.tiers or pool.geometry is None or pool.pool_id == self._pool_id:
            return
        self._pool_id = pool.pool_id
        # At once: what moved blocks of the former layout knows other places of the pool.
        movers, before = self._stop_moving(), self._set
        view, mode = pool.view(), PlanMode(self._settings.planner)
        pace = self.pace = Pace(PlannerSettings(mode=mode), view.geometry.layout, self._clock)

        def opened(tier: LowerTier, reads: Reads) -> None:
            for num_bytes, seconds in reads:
                pace.measured(tier.name, num_bytes, seconds)
            self._begin(self._take_stock(cascade, tier), self._stocks)

        self._set = TierSet(self._settings.named_tiers, self._clock, self._count)
        tiers = self._set.tiers
        cascade = self._cascade = Cascade(self._shell, tiers, view, self._count)
        self._promotion = Promotion(self._shell, tiers, view, pace, self._clock, self._count)
        self._begin(self._end(movers, before), self._closing)
        self._set.open(view, opened, list(self._closing), before)

    def _begin(self, work: Coroutine[None, None, None], among: set["asyncio.Task[None]"]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        among.add(task)
        task.add_done_callback(among.discard)
        task.add_done_callback(raise_defect)

    def _stop_moving(self) -> list[Mover]:
        """Begin nothing more; returns what has to come to its end."""
        movers = [mover for mover in (self._cascade, self._promotion) if mover is not None]
        for mover in movers:
            mover.stop()
        for task in self._stocks | self._prefetches:
            task.cancel()
        self._cascade = self._promotion = None
        return movers

    async def _take_stock_again(self, cascade: Cascade, tier: LowerTier) -> None:
        """A tier could not be reached, or has lost something: it may have lost everything."""
        try:
            await self._take_stock(cascade, tier, are_uses=False)
        finally:
            tier.known.stock_ended()

    async def _take_stock(
        self, cascade: Cascade, tier: LowerTier, *, are_uses: bool = True
    ) -> None:
        """Blocks that were readable before this tier was open, as after a restart.

        It may have most of them already, which nobody knows of a tier that is not local.
        """
        node = self._shell.node
        slots = [] if node is None else node.ledger.ready_slots()
        keys = [slot.key for slot in slots if slot.key is not None]
        for start in range(0, len(keys), USES_AT_ONCE):
            batch = keys[start : start + USES_AT_ONCE]
            await tier.take_stock(batch)
            cascade.ready(batch, [tier], are_uses=are_uses)
            await asyncio.sleep(0)  # others have their turn

    async def _end(self, movers: Sequence[Mover], tiers: TierSet) -> None:
        await asyncio.gather(*(mover.drain(DRAIN_S) for mover in movers))
        for mover in movers:
            mover.abandon()
        await tiers.close()
        self.is_hanging |= tiers.is_hanging

    async def close(self) -> None:
        """End what is in motion and close the tiers, in a bounded time; what they keep stays."""
        self._begin(self._end(self._stop_moving(), self._set), self._closing)
        while self._closing:
            await asyncio.wait(set(self._closing))

    def tick(self) -> None:
        """Several times a second: notice calls that hang, and try again what has to be done."""
        self._set.retry()
        for tier in self.tiers:
            tier.tick()
            if tier.wants_stock and self._cascade is not None:
                tier.known.stock_begun(self._clock.now_s())
                log.info("a tier is asked for the pool's blocks again. tier=%s", tier.name)
                self._begin(self._take_stock_again(self._cascade, tier), self._stocks)

    def status(self) -> dict[str, object]:
        """What stands below the pool, for a person or a script."""
        pace = self.pace
        return {
            "is_open": self._pool_id is not None and not self._set.opening,
            "waiting": self._waiting_tiers(),
            "opening": list(self._set.opening),
            "tiers": [tier.status() for tier in self.tiers],
            "failed": dict(self.closed_tiers),
            "retried": self._set.retried,
            "cascades_waiting": 0 if self._cascade is None else self._cascade.num_waiting,
            "bytes_per_s": {} if pace is None else pace.speeds(),
            "last_plan": "" if pace is None else pace.last_reason,
        }

    def _waiting_tiers(self) -> list[str]:
        """Names of those that nobody begins to open before the first engine has come."""
        return [t.name for t in self._settings.named_tiers] if self._pool_id is None else []

    @property
    def plan_reason(self) -> str:
        """What the planner said last; empty before it was asked."""
        return "" if self.pace is None else self.pace.last_reason

    # ---- what happened

    def stored(self, keys: Sequence[BlockKey]) -> None:
        """Engines' blocks became readable in the pool."""
        if self._cascade is not None:
            self._cascade.ready(keys)

    def used(self, wanted: Wanted, num_blocks: int) -> None:
        """An engine was lent the leading blocks: admission hears of it when there is time."""
        if self._cascade is None:
            return
        self._uses.extend(wanted.keys(0, num_blocks))
        if self._uses and not self._is_taking_uses:
            self._is_taking_uses = True
            asyncio.get_running_loop().call_soon(self._take_uses)

    def _take_uses(self) -> None:
        batch = [self._uses.popleft() for _ in range(min(USES_AT_ONCE, len(self._uses)))]
        self.stored(batch)
        self._is_taking_uses = bool(self._uses)
        if self._uses:
            asyncio.get_running_loop().call_soon(self._take_uses)

    def loaded(self, num_blocks: int, load_us: int) -> None:
        """An engine reported a load from the pool."""
        if self.pace is not None and num_blocks:
            self.pace.loaded(num_blocks, load_us / 1e6)

    def corrupt(self, keys: Sequence[BlockKey]) -> None:
        """Blocks did not match their digests: what lower tiers hold of them is doubted too."""
        self._set.delete(keys)

    async def hold(self, tiers: Sequence[LowerTier]) -> None:
        """Keep everything away from these tiers, until ``let_go``; ends when nothing moves there.

        What was on its way to them has arrived then.

        Raises:
            UnavailableError: Something on its way there hangs; they are held all the same.
        """
        for tier in tiers:
            tier.is_held = True
        if self._cascade is not None:
            await self._cascade.leave(tiers)

    def let_go(self, tiers: Sequence[LowerTier]) -> None:
        """Undo ``hold``."""
        for tier in tiers:
            tier.is_held = False

    # ---- what a request waits for

    def may_come(self, wanted: Wanted, num_ready: int) -> bool:
        """Whether ``bring`` may make more of the prefix readable."""
        return self._promotion is not None and self._promotion.may_come(wanted, num_ready)

    def prefetch(self, wanted: Wanted) -> int:
        """Begin to bring a prefix into the pool for which nobody waits yet.

        Returns:
            Blocks that are looked for; 0 if there is nothing to do, or too much is under way.
        """
        self._count("prefetches_asked", 1)
        promotion = self._promotion
        num_ready = 0 if promotion is None else promotion.num_ready(wanted)
        if promotion is None or not promotion.may_come(wanted, num_ready):
            return 0
        if len(self._prefetches) >= PREFETCHES_MAX:
            self._count("prefetches_refused", 1)
            return 0
        self._begin(self._prefetch(promotion, wanted, num_ready), self._prefetches)
        return len(wanted.hashes) - num_ready

    async def _prefetch(self, promotion: Promotion, wanted: Wanted, num_ready: int) -> None:
        held = promotion.hold(wanted, num_ready)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PREFETCH_S):
                    await promotion.bring(wanted, lambda _wait_s: None)
        finally:
            promotion.let_go(held)
        if promotion.num_ready(wanted) > num_ready:
            self._count("prefetches_brought", 1)

    async def bring(
        self,
        wanted: Wanted,
        announce: Callable[[float], None],
        limit_s: float = float("inf"),
    ) -> None:
        """Bring blocks of a prefix into the pool; ends at the time that was announced last.

        Args:
            wanted: The whole prefix; who asks keeps what is readable of it where it is.
            announce: Called with the seconds that it may take from then on.
            limit_s: The longest wait altogether, in seconds.
        """
        promotion = self._promotion
        if promotion is None or self.pace is None:
            return
        loop = asyncio.get_running_loop()
        # Who is told to load waits for that, however busy this machine is with finding out.
        probe_s, most_s = self.pace.waits_s(
            promotion.num_ready(wanted), len(wanted.hashes), wanted.prefill_tokens_s
        )
        limit_s = min(limit_s, most_s)
        last_s = loop.time() + limit_s
        until_s = min(last_s, loop.time() + probe_s)
        announce(min(limit_s, probe_s))

        def extend(wait_s: float) -> None:
            nonlocal until_s
            until_s = min(last_s, max(until_s, loop.time() + wait_s))
            announce(max(0.0, until_s - loop.time()))

        task = loop.create_task(promotion.bring(wanted, extend))
        try:
            while not task.done() and (left_s := until_s - loop.time()) > 0:
                await asyncio.wait({task}, timeout=left_s)
            if task.done():
                task.result()
            else:
                self._count("promotions_late", 1)
        finally:
            # The reads themselves go on to their ends; nobody begins others for who has left.
            task.cancel()
