"""The tiers for one layout of the pool: opened side by side, and closed together.

Each opens by itself, so that one whose server accepts and never answers keeps nobody waiting: the
others serve, and the end of all of them is bounded.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from kvkeep.daemon.movement.lower_tier import UNWANTED_MAX, LowerTier
from kvkeep.daemon.movement.opening import open_tier, register_pool
from kvkeep.daemon.movement.own_thread import on_own_thread
from kvkeep.daemon.movement.proving import Proof, Reads, prove_tier
from kvkeep.daemon.movement.slots import value_bytes
from kvkeep.daemon.tier_settings import AnyTierSettings
from kvkeep.model.clock import Clock
from kvkeep.model.errors import CorruptDataError, InputError, UnavailableError
from kvkeep.model.ids import BlockKey
from kvkeep.tiers.shared_memory import PoolView

log = logging.getLogger(__name__)

CLOSE_S = 2.0
"""Tiers are closed within this time, whatever hangs."""
RETRY_S = 2.0
"""Until a tier that could not be opened is tried again; doubled each time, up to ..."""
RETRY_S_MAX = 60.0
PROVE_S = 1.0
"""Until a tier that did not answer is asked again to prove itself."""
PROVE_DECLINED_S = 60.0
"""The same for one that answers and keeps nothing: it serves meanwhile."""
CALLS_SHARE = 0.5
"""Of that, for a tier's calls under way; the rest is for its own end."""

Opened = Callable[[LowerTier, Reads], None]
"""Told of each tier that serves, on the event loop's thread."""


class TierSet:
    """Runs on the event loop's thread; opening and closing run on threads of their own."""

    def __init__(
        self,
        settings: Sequence[AnyTierSettings],
        clock: Clock,
        count: Callable[[str, int], None],
    ) -> None:
        """Hold no tier yet.

        Args:
            settings: Of the tiers, each with its name, the fastest first.
            clock: Monotonic.
            count: Adds to a counter.
        """
        self._count = count
        self._settings = settings
        self._clock = clock
        self._is_over = False
        self._by_place: dict[int, LowerTier] = {}
        self.tiers: list[LowerTier] = []
        """Those that are open, in the order of the settings; this list changes in place."""
        self.opening: dict[str, asyncio.Task[None]] = {}
        """Those that are not open yet."""
        self.failed: dict[str, str] = {}
        """Why a tier can't be used, by its name."""
        self._doubted: OrderedDict[BlockKey, None] = OrderedDict()
        """Blocks found rotten while tiers were opening, which may have them."""
        self.is_hanging = False
        """Something did not end in time; it ends with the process."""
        self._for: tuple[PoolView, Opened] | None = None
        """What the tiers are opened for, as long as any may be."""
        self._retries: dict[str, tuple[float, float]] = {}
        """When those that failed are tried again, and the pause after that."""
        self._proving: dict[int, asyncio.Task[None]] = {}
        """What has an open tier prove itself, by its place in the settings."""
        self._prove_at_s: dict[int, float] = {}
        """When an open tier that is not proven is asked next."""
        self._switched_off: set[asyncio.Task[bool]] = set()
        """What closes tiers that failed to prove themselves."""

    def open(
        self,
        view: PoolView,
        opened: Opened,
        after: Sequence["asyncio.Task[None]"] = (),
        before: "TierSet | None" = None,
    ) -> None:
        """Begin to open every tier.

        Args:
            view: Of the pool that they are opened for.
            opened: Told of each that serves.
            after: What has to be over first.
            before: The set in whose place this one comes: what it still opens has to end first, as
                both use the same folders and names.
        """
        self._for = view, opened
        for place, settings in enumerate(self._settings):
            earlier = None if before is None else before.opening.get(settings.name)
            self._begin(place, [*after] if earlier is None else [*after, earlier])

    def _begin(self, place: int, after: Sequence["asyncio.Task[None]"]) -> None:
        assert self._for is not None
        settings, (view, opened) = self._settings[place], self._for
        call = partial(_open_and_prove, settings, view, self._clock)
        take_in = partial(self._take_in, place, opened)
        task = asyncio.get_running_loop().create_task(
            self._open(settings.name, call, take_in, after)
        )
        self.opening[settings.name] = task
        task.add_done_callback(raise_defect)

    @property
    def retried(self) -> list[str]:
        """Names of those that failed and are tried again by themselves."""
        return list(self._retries)

    def retry(self) -> None:
        """Try again to open what could not be opened, and to prove what did not answer.

        Call it often: it looks whether it is time.
        """
        if self._is_over:
            return
        now_s = self._clock.now_s()
        for place, settings in enumerate(self._settings):
            at_s, _ = self._retries.get(settings.name, (float("inf"), 0.0))
            if now_s >= at_s and settings.name not in self.opening:
                self._begin(place, ())
        for place, tier in self._by_place.items():
            is_due = now_s >= self._prove_at_s.get(place, 0.0)
            if tier.proof is not Proof.DONE and is_due and place not in self._proving:
                task = asyncio.get_running_loop().create_task(self._prove(place, tier))
                self._proving[place] = task
                task.add_done_callback(raise_defect)

    async def _prove(self, place: int, tier: LowerTier) -> None:
        """Have a tier prove itself that has not: it serves from then on, or never."""
        pause_s = PROVE_S
        try:
            reads = await tier.prove()
        except UnavailableError:
            pass  # its breaker has counted that
        except CorruptDataError as error:
            self._switch_off(place, tier, error)
        else:
            self._proven(tier, reads)
            pause_s = PROVE_DECLINED_S
        finally:
            self._prove_at_s[place] = self._clock.now_s() + pause_s
            del self._proving[place]

    def _proven(self, tier: LowerTier, reads: Reads) -> None:
        was_awaited = tier.proof is Proof.AWAITED
        tier.proof = Proof.DONE if reads else Proof.DECLINED
        if was_awaited and self._for is not None:
            log.info("a tier answers. tier=%s proof=%s", tier.name, tier.proof.value)
            self._for[1](tier, reads)

    def _switch_off(self, place: int, tier: LowerTier, error: CorruptDataError) -> None:
        """Take a tier out that is not to be believed, and close it."""
        if self._by_place.pop(place, None) is None:
            return
        self.tiers[:] = [found for _, found in sorted(self._by_place.items())]
        self._note_failure(self._settings[place].name, error)
        task = asyncio.ensure_future(
            on_own_thread(partial(_close_tier, tier), f"close-{tier.name}")
        )
        self._switched_off.add(task)

    def _note_failure(self, name: str, error: Exception) -> None:
        if self.failed.get(name) != str(error):
            log.error("a tier can't be used. tier=%s reason=%s", name, str(error))
        self.failed[name] = str(error)
        _, pause_s = self._retries.pop(name, (0.0, RETRY_S))
        if isinstance(error, CorruptDataError):
            self._count("tier_proofs_failed", 1)  # it is not believed again
        else:
            retry_s = self._clock.now_s() + pause_s
            self._retries[name] = (retry_s, min(2 * pause_s, RETRY_S_MAX))

    async def opened(self) -> None:
        """Wait until no tier is opening any more."""
        if self.opening:
            await asyncio.wait(set(self.opening.values()))

    async def _open(
        self,
        name: str,
        call: Callable[[], tuple[LowerTier, Reads]],
        take_in: Opened,
        after: Sequence["asyncio.Task[None]"],
    ) -> None:
        try:
            if after:
                await asyncio.wait(set(after))
            if self._is_over:
                return
            tier, reads = await on_own_thread(call, f"open-{name}")
        except (InputError, UnavailableError, CorruptDataError) as error:
            self._note_failure(name, error)
        else:
            self.failed.pop(name, None)
            self._retries.pop(name, None)
            if self._is_over:
                await on_own_thread(partial(_close_tier, tier), f"close-{name}")
            else:
                take_in(tier, reads)
        finally:
            del self.opening[name]
            if not self.opening:
                self._doubted.clear()

    def _take_in(self, place: int, opened: Opened, tier: LowerTier, reads: Reads) -> None:
        self._by_place[place] = tier
        self.tiers[:] = [found for _, found in sorted(self._by_place.items())]
        tier.delete(list(self._doubted))
        log.info("tier opened. tier=%s proof=%s", tier.name, tier.proof.value)
        if tier.proof is not Proof.AWAITED:
            opened(tier, reads)

    def delete(self, keys: Iterable[BlockKey]) -> None:
        """Have every tier forget these blocks, sooner or later; also those that are opening."""
        keys = list(keys)
        for tier in self.tiers:
            tier.delete(keys)
        if self.opening:
            self._doubted.update(dict.fromkeys(keys))
            while len(self._doubted) > UNWANTED_MAX:
                self._doubted.popitem(last=False)

    async def close(self) -> None:
        """Close what is open, and what still opens as soon as it is; what they keep stays."""
        self._is_over, self._for = True, None
        closing = [
            asyncio.ensure_future(on_own_thread(partial(_close_tier, tier), f"close-{tier.name}"))
            for tier in self.tiers
        ]
        closing += self._switched_off
        self.tiers = []
        self.is_hanging = bool(self.opening)
        if closing:
            done, pending = await asyncio.wait(closing, timeout=CLOSE_S)
            self.is_hanging |= bool(pending) or not all(task.result() for task in done)
        for proof in self._proving.values():
            proof.cancel()


def _open_and_prove(
    settings: AnyTierSettings, view: PoolView, clock: Clock
) -> tuple[LowerTier, Reads]:
    """Open, prove and time one tier; on a thread of its own, before anyone else uses it.

    Raises:
        InputError: It can't be used as the settings say.
        UnavailableError: Nor now.
        CorruptDataError: It gives back other bytes than it was given; it is closed.
    """
    tier = open_tier(settings, value_bytes(view), clock)
    try:
        register_pool(tier, view.region)
        reads = prove_tier(
            tier.queue.tier, value_bytes(view), lambda: tier.num_rejected, tier.canaries
        )
    except UnavailableError as error:
        # It may come, and is proven then.
        log.warning("a tier does not answer yet. tier=%s reason=%s", tier.name, str(error))
        tier.proof = Proof.AWAITED
        return tier, ()
    except CorruptDataError:
        _close_tier(tier)
        raise
    tier.proof = Proof.DONE if reads else Proof.DECLINED
    return tier, reads


def _close_tier(tier: LowerTier) -> bool:
    """End a tier's calls and the tier; on a thread of its own. False if calls hang."""
    hanging = tier.queue.close(CLOSE_S * CALLS_SHARE)
    if hanging:
        # Its memory is still written to; it ends with the process.
        log.warning("calls of a tier hang. tier=%s calls=%d", tier.name, len(hanging))
    else:
        tier.queue.tier.close()
    return not hanging


def raise_defect(task: "asyncio.Task[None]") -> None:
    """When a task has ended: have a defect in it go to the loop's handler."""
    if not task.cancelled():
        task.result()
