"""All that moves blocks between the pool and the tiers below it, for as long as the daemon runs.

The tiers are opened when the pool has a layout, as that decides the length of a value, and again
when it gets another. Until they are open, and where one can't be, the daemon serves without.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence

from kvkeep.core.planner import PlanMode, PlannerSettings
from kvkeep.daemon.movement.cascade import Cascade
from kvkeep.daemon.movement.lower_tier import LowerTier
from kvkeep.daemon.movement.opening import open_tier, register_pool
from kvkeep.daemon.movement.pace import Pace
from kvkeep.daemon.movement.promotion import Promotion, Wanted
from kvkeep.daemon.movement.proving import prove_tier
from kvkeep.daemon.movement.slots import value_bytes
from kvkeep.daemon.settings import DaemonSettings
from kvkeep.daemon.shell import Shell
from kvkeep.daemon.tier_settings import AnyTierSettings
from kvkeep.model.clock import Clock
from kvkeep.model.errors import CorruptDataError, InputError, UnavailableError
from kvkeep.model.ids import BlockKey
from kvkeep.tiers.shared_memory import PoolView

log = logging.getLogger(__name__)

Mover = Cascade | Promotion

DRAIN_S = 4.0
"""What is in motion when the daemon stops, or when the layout changes, is waited for so long."""
CLOSE_S = 2.0
"""And then a tier's calls; the daemon ends in the sum of both, whatever hangs."""
PROBE_S = 0.25
"""Announced to a client before it is known where its blocks are."""
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
        self._opening: asyncio.Task[None] | None = None
        self._stock: asyncio.Task[None] | None = None
        self.tiers: list[LowerTier] = []
        self.closed_tiers: dict[str, str] = {}
        """Why a tier could not be opened, by its name."""
        self.pace: Pace | None = None
        self._cascade: Cascade | None = None
        self._promotion: Promotion | None = None
        self._uses: deque[BlockKey] = deque(maxlen=USES_MAX)
        self._is_taking_uses = False

    # ---- opening and closing

    async def opened(self) -> None:
        """Wait until the tiers are open, or known not to be."""
        self.follow()
        if self._opening is not None:
            await asyncio.shield(self._opening)

    def follow(self) -> None:
        """Open the tiers for the pool's layout, if they are not."""
        pool = self._shell.pool
        if not self._settings.tiers or pool.geometry is None or pool.pool_id == self._pool_id:
            return
        self._pool_id = pool.pool_id
        # At once: what moved blocks of the former layout knows other places of the pool.
        movers = self._stop_moving()
        task = self._reopen(pool.view(), pool.pool_id, self._opening, movers)
        self._opening = asyncio.get_running_loop().create_task(task)
        self._opening.add_done_callback(_raise_defect)

    def _stop_moving(self) -> list[Mover]:
        """Begin nothing more; returns what has to come to its end."""
        movers = [mover for mover in (self._cascade, self._promotion) if mover is not None]
        for mover in movers:
            mover.stop()
        if self._stock is not None:
            self._stock.cancel()
        self._cascade = self._promotion = None
        return movers

    async def _reopen(
        self,
        view: PoolView,
        pool_id: bytes,
        before: "asyncio.Task[None] | None",
        movers: Sequence[Mover],
    ) -> None:
        if before is not None:
            await before
        await self._close_tiers(movers)
        pace = Pace(
            PlannerSettings(mode=PlanMode(self._settings.planner)),
            view.geometry.layout,
            self._clock,
        )
        for settings in self._settings.named_tiers:
            tier = await asyncio.to_thread(self._open, settings, view, pace)
            if tier is not None:
                self.tiers.append(tier)
        if pool_id != self._pool_id:
            return  # it has another layout by now, and the next task waits for this one
        self.pace = pace
        self._cascade = Cascade(self._shell, self.tiers, view, self._count)
        self._promotion = Promotion(self._shell, self.tiers, view, pace, self._clock, self._count)
        log.info("tiers opened. names=%s", ",".join(tier.name for tier in self.tiers))
        self._stock = asyncio.get_running_loop().create_task(self._take_stock(self._cascade))
        self._stock.add_done_callback(_raise_defect)

    def _open(self, settings: AnyTierSettings, view: PoolView, pace: Pace) -> LowerTier | None:
        """Open, prove and time one tier; on a thread of its own, before anyone else uses it."""
        name = settings.name
        try:
            tier = open_tier(settings, value_bytes(view), self._clock)
        except (InputError, UnavailableError) as error:
            log.error("a tier can't be used. tier=%s reason=%s", name, str(error))  # noqa: TRY400
            self.closed_tiers[name] = str(error)
            return None
        try:
            register_pool(tier, view.region)
            for num_bytes, seconds in prove_tier(tier.queue.tier, value_bytes(view)):
                pace.measured(tier.name, num_bytes, seconds)
        except UnavailableError as error:
            # It may come; its breaker finds out.
            log.warning("a tier does not answer yet. tier=%s reason=%s", tier.name, str(error))
        except CorruptDataError as error:
            log.error("a tier is switched off. tier=%s reason=%s", name, str(error))  # noqa: TRY400
            self.closed_tiers[name] = str(error)
            _close_tier(tier)
            return None
        return tier

    async def _take_stock(self, cascade: Cascade) -> None:
        """Blocks that were readable before the tiers were open, as after a restart.

        Most of them are in the tiers already, which know nothing of that but for a local one.
        """
        node = self._shell.node
        slots = [] if node is None else node.ledger.ready_slots()
        keys = [slot.key for slot in slots if slot.key is not None]
        for start in range(0, len(keys), USES_AT_ONCE):
            batch = keys[start : start + USES_AT_ONCE]
            await asyncio.gather(*(tier.take_stock(batch) for tier in self.tiers))
            cascade.ready(batch)
            await asyncio.sleep(0)  # others have their turn

    async def _close_tiers(self, movers: Sequence[Mover]) -> None:
        await asyncio.gather(*(mover.drain(DRAIN_S) for mover in movers))
        for mover in movers:
            mover.abandon()
        await asyncio.gather(*(asyncio.to_thread(_close_tier, tier) for tier in self.tiers))
        self.tiers = []
        self.closed_tiers = {}

    async def close(self) -> None:
        """End what is in motion and close the tiers; what they keep stays."""
        if self._opening is not None:
            await self._opening
        await self._close_tiers(self._stop_moving())

    def tick(self) -> None:
        """Several times a second: notice calls that hang, and try again what has to be done."""
        for tier in self.tiers:
            tier.tick()

    def status(self) -> dict[str, object]:
        """What stands below the pool, for a person or a script."""
        pace = self.pace
        return {
            "is_open": self._cascade is not None,
            "tiers": [tier.status() for tier in self.tiers],
            "failed": self.closed_tiers,
            "cascades_waiting": 0 if self._cascade is None else self._cascade.num_waiting,
            "bytes_per_s": {} if pace is None else pace.speeds(),
            "last_plan": "" if pace is None else pace.last_reason,
        }

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
        for tier in self.tiers:
            tier.delete(keys)

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
        if promotion is None:
            return
        loop = asyncio.get_running_loop()
        last_s = loop.time() + limit_s
        until_s = min(last_s, loop.time() + PROBE_S)
        announce(PROBE_S)

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


def _close_tier(tier: LowerTier) -> None:
    """End a tier's calls and the tier; on a thread of its own."""
    hanging = tier.queue.close(CLOSE_S)
    if hanging:
        # Its memory is still written to; it ends with the process.
        log.warning("calls of a tier hang. tier=%s calls=%d", tier.name, len(hanging))
    else:
        tier.queue.tier.close()


def _raise_defect(task: "asyncio.Task[None]") -> None:
    if not task.cancelled():
        task.result()  # goes to the loop's handler
