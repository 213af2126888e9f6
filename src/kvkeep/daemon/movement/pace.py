"""What is worth waiting for: measured speeds of tiers, and the plan made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvkeep.core.planner import (
    MeasuredRate,
    Place,
    Plan,
    PlanMode,
    PlannerSettings,
    PrefillSpeed,
    RequestShape,
    Run,
    Source,
    Speed,
    plan,
)
from kvkeep.daemon.movement.lower_tier import LowerTier
from kvkeep.model.clock import Clock
from kvkeep.model.layout import KvLayout

ASSUMED_POOL_SPEED = Speed(latency_s=0.0005, per_s=4e9)
"""Of loads from the pool before one was reported; any machine's memory is faster than that."""
STALE_S = 30.0
"""A tier that was not read for so long may have another speed by now."""
LIMIT_FACTOR = 3.0
"""A promotion is waited for at most this many times its estimate ..."""
LIMIT_SHARE = 0.5
"""... or this share of what computing would take, if that is more: an estimate knows nothing of a
machine that is busy this very moment, and what was given up late is computed late."""
LIMIT_MIN_S = 0.1
"""Below this nothing is given up that computing takes longer than: scheduling alone may take that
long."""
PROBE_S = 0.25
"""Waited for at most before it is known where blocks are."""
LIMIT_PINNED_S = 5.0
"""How long is waited at most where the choice is pinned to loading."""


@dataclass(frozen=True, slots=True)
class Pacing:
    """How much of a prefix to bring, and how long to wait for it."""

    num_blocks: int
    limit_s: float
    saved_s: float | None
    explored: str | None
    reason: str


class Pace:
    """Measures, and plans. Runs on the event loop's thread."""

    def __init__(self, settings: PlannerSettings, layout: KvLayout, clock: Clock) -> None:
        self._settings = settings
        self._layout = layout
        self._clock = clock
        self._pool = MeasuredRate()
        self._tiers: dict[str, MeasuredRate] = {}
        self._explored: set[str] = set()
        self._queued: dict[str, int] = {}
        self.saved_us = 0
        """Estimated time to first token that promotions saved so far, in microseconds."""
        self.last_reason = ""

    def loaded(self, num_blocks: int, seconds: float) -> None:
        """An engine reported a load from the pool."""
        amount = num_blocks * self._layout.block_bytes
        self._pool.add(amount, seconds, now_s=self._clock.now_s())

    def begun(self, name: str, num_bytes: int) -> None:
        """A promotion asks a tier for so many bytes."""
        self._queued[name] = self._queued.get(name, 0) + num_bytes

    def ended(self, name: str, num_bytes: int, seconds: float | None) -> None:
        """It is over.

        Args:
            name: Of the tier.
            num_bytes: As in ``begun``.
            seconds: How long it took; None if it failed or had to share the tier with others.
        """
        self._queued[name] -= num_bytes
        self._explored.discard(name)
        if seconds is not None:
            self.measured(name, num_bytes, seconds)

    def measured(self, name: str, num_bytes: int, seconds: float) -> None:
        """A tier read so many bytes in this time, with nothing else to do."""
        rate = self._tiers.setdefault(name, MeasuredRate())
        rate.add(num_bytes, seconds, now_s=self._clock.now_s())

    def is_alone(self, name: str) -> bool:
        """Whether no other promotion reads from this tier, so that the next one measures it."""
        return not self._queued.get(name)

    def may_pay(
        self, num_ready: int, num_hashes: int, tier: LowerTier, prefill_tokens_s: float
    ) -> bool:
        """Whether bringing blocks from this tier could be planned, if it had all of them.

        What can't, is not looked for: on a fast engine that alone would cost a short prompt more
        than it has to gain.
        """
        places: list[Run] = [(Place.POOL, num_ready), (tier.name, num_hashes - num_ready)]
        sources = self._sources([(tier, 0)], self._clock.now_s())
        chosen = self._weigh(places, num_hashes, sources, prefill_tokens_s)
        if chosen.num_load > chosen.num_from_pool:
            return True
        self.last_reason = chosen.reason
        return False

    def _weigh(
        self,
        places: Sequence[Run],
        num_hashes: int,
        sources: Mapping[Place | str, Source],
        prefill_tokens_s: float,
    ) -> Plan:
        layout = self._layout
        shape = RequestShape(
            num_hashes * layout.block_tokens, layout.block_tokens, layout.block_bytes
        )
        prefill = PrefillSpeed(prefill_tokens_s) if prefill_tokens_s else None
        return plan(places, shape, sources, prefill, self._settings)

    def plan(
        self,
        num_ready: int,
        num_hashes: int,
        runs: Sequence[tuple[LowerTier, int]],
        prefill_tokens_s: float,
    ) -> Pacing:
        """Decide how many of the blocks behind the readable ones to bring."""
        places: list[Run] = [(Place.POOL, num_ready)]
        places += [(tier.name, length) for tier, length in runs]
        sources = self._sources(runs, self._clock.now_s())
        chosen = self._weigh(places, num_hashes, sources, prefill_tokens_s)
        num_blocks = max(0, chosen.num_load - chosen.num_from_pool)
        explored = str(chosen.explored) if isinstance(chosen.explored, str) else None
        if num_blocks and explored is not None:
            self._explored.add(explored)
        if num_blocks and chosen.saved_s is not None and explored is None:
            self.saved_us += int(max(0.0, chosen.saved_s) * 1e6)
        self.last_reason = chosen.reason
        limit_s = self._limit_s(chosen.load_s, chosen.recompute_s, prefill_tokens_s)
        return Pacing(num_blocks, limit_s, chosen.saved_s, explored, chosen.reason)

    def _sources(
        self, runs: Sequence[tuple[LowerTier, int]], now_s: float
    ) -> dict[Place | str, Source]:
        sources: dict[Place | str, Source] = {
            Place.POOL: Source(self._pool.speed() or ASSUMED_POOL_SPEED)
        }
        for tier, _ in runs:
            rate = self._tiers.get(tier.name)
            sources[tier.name] = Source(
                None if rate is None else rate.speed(),
                self._queued.get(tier.name, 0),
                tier.name in self._explored,
                rate is not None and now_s - rate.measured_at_s > STALE_S,
            )
        return sources

    def _limit_s(self, load_s: float | None, recompute_s: float, prefill_tokens_s: float) -> float:
        if self._settings.mode is PlanMode.LOAD:
            return LIMIT_PINNED_S
        wanted_s = max(LIMIT_FACTOR * (load_s or 0.0), LIMIT_SHARE * recompute_s)
        if not prefill_tokens_s:  # computing is estimated by a guess
            return max(min(wanted_s, recompute_s), LIMIT_MIN_S)
        return min(max(wanted_s, LIMIT_MIN_S), recompute_s)

    def waits_s(
        self, num_ready: int, num_hashes: int, prefill_tokens_s: float
    ) -> tuple[float, float]:
        """How long a request waits at most until its blocks are found, and altogether.

        Never longer than computing what is missing takes, where that is known and the choice is
        not pinned to loading.
        """
        if self._settings.mode is PlanMode.LOAD:
            return LIMIT_PINNED_S, float("inf")
        if not prefill_tokens_s:
            return PROBE_S, float("inf")
        tokens = self._layout.block_tokens
        speed = PrefillSpeed(prefill_tokens_s)
        compute_s = speed.seconds(num_ready * tokens, (num_hashes - num_ready) * tokens)
        return min(PROBE_S, LIMIT_SHARE * compute_s), compute_s

    def speeds(self) -> dict[str, float]:
        """Measured bytes a second by tier, the pool's among them; only what was measured."""
        rates = {"pool": self._pool, **self._tiers}
        found = {name: rate.speed() for name, rate in rates.items()}
        return {name: speed.per_s for name, speed in found.items() if speed is not None}
