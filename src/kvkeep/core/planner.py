"""Load or recompute: how many leading blocks of a request are faster to load than to compute.

The model of the time to first token, with the first ``k`` blocks loaded, in seconds:

    sum over the tiers that are read of  latency + (queued bytes + bytes) / (bytes/s)
    + if any block is loaded             latency + bytes / (bytes/s)         pool to engine
    + the prefill of all tokens after the first k blocks

Nothing overlaps: tiers are read one after another, then the engine copies, then it computes. That
overestimates loading, never computing. Why this is enough, and how what was never measured is tried
out: docs/decisions/0015-load-or-recompute.md.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import inf, isfinite

from kvkeep.model.errors import InputError

ASSUMED_PREFILL_TOKENS_PER_S = 100_000.0
"""Until the engine's own rate is known: faster than engines are, so that computing is preferred."""

EXPLORE_AGAIN = 4
"""The second look is larger than the first: only unequal amounts tell latency from rate."""

# ---- measuring


@dataclass(frozen=True, slots=True)
class Speed:
    """What moving or computing costs: a fixed part and a rate."""

    latency_s: float
    per_s: float
    """Bytes or tokens in one second, beyond the latency."""

    def seconds(self, amount: float) -> float:
        """Time for this many bytes or tokens."""
        return self.latency_s + amount / self.per_s


SURPRISE = 4.0
"""A sample this many times slower or faster than predicted is an outlier or news."""

SURPRISES_MAX = 3
"""So many surprises in a row, in one direction, are news: what was before is forgotten."""

LATENCY_SHARE_MAX = 0.75
"""Of the mean sample's time. More could not be told from noise, and would promise large transfers
a rate above ``SURPRISE`` times any that was seen."""

SPREAD_MIN = 0.1
"""Standard deviation over mean of the samples' amounts below which latency and rate can't be told
apart; all time then counts as rate, which is too slow for larger amounts, never too fast."""


class MeasuredRate:
    """Estimates a ``Speed`` from samples: a straight line through them, the old ones fading.

    A sample smaller than the mean counts, and makes others fade, by its share of the mean: a flood
    of single blocks does not wash out what was learned from long prefixes.

    The line passes through the samples' mean, so the speed at the mean amount lies between the
    slowest and the fastest sample. One or two slow outliers in a row count as ``SURPRISE`` times
    what was predicted; a fast one counts for little by itself, as seconds are what is averaged.
    """

    def __init__(self, *, half_life_samples: float = 8.0) -> None:
        """Know nothing.

        Args:
            half_life_samples: After so many samples, an older one counts half.
        """
        if not half_life_samples > 0:
            raise ValueError(f"must be above 0. half_life_samples={half_life_samples}")
        self._keep = 0.5 ** (1.0 / half_life_samples)
        self._surprises: deque[tuple[float, float]] = deque(maxlen=SURPRISES_MAX)
        self._is_slow_news = False
        self._forget()
        self.num_samples = 0
        self.measured_at_s = -inf
        """Monotonic time of the last sample."""

    def _forget(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, amount: float, seconds: float, *, now_s: float) -> None:
        """Take in one sample; one without amount or duration says nothing and is ignored.

        Args:
            amount: Bytes or tokens.
            seconds: How long they took, without waiting for others.
            now_s: Monotonic time.
        """
        if not (amount > 0 and seconds > 0 and isfinite(amount) and isfinite(seconds)):
            return
        self.num_samples += 1
        self.measured_at_s = now_s
        speed = self.speed()
        if speed is not None:
            mean, mean_s = self._x / self._weight, self._y / self._weight
            expected_s = speed.seconds(amount)
            # What takes less than the mean sample is no outlier, however small: that is latency.
            slow_s = SURPRISE * max(expected_s, mean_s)
            is_fast = seconds * SURPRISE < expected_s and amount * SURPRISE >= mean
            if self._is_news(amount, seconds, is_slow=seconds > slow_s, is_fast=is_fast):
                self._forget()
                for old_amount, old_seconds in self._surprises:
                    self._count(old_amount, old_seconds)
                self._surprises.clear()
                return
            seconds = min(seconds, slow_s)
        self._count(amount, seconds)

    def _is_news(self, amount: float, seconds: float, *, is_slow: bool, is_fast: bool) -> bool:
        """Note a surprise; true for the last of ``SURPRISES_MAX`` in a row."""
        if not (is_slow or is_fast):
            self._surprises.clear()
            return False
        if is_slow != self._is_slow_news:
            self._surprises.clear()
            self._is_slow_news = is_slow
        self._surprises.append((amount, seconds))
        return len(self._surprises) == SURPRISES_MAX

    def _count(self, amount: float, seconds: float) -> None:
        weight = min(1.0, amount * self._weight / self._x) if self._weight else 1.0
        keep = self._keep**weight
        self._weight = self._weight * keep + weight
        self._x = self._x * keep + weight * amount
        self._y = self._y * keep + weight * seconds
        self._xx = self._xx * keep + weight * amount * amount
        self._xy = self._xy * keep + weight * amount * seconds

    def speed(self) -> Speed | None:
        """The estimate; None before the first sample."""
        if not self._weight:
            return None
        mean, mean_s = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean * mean
        latency_s = 0.0
        if variance > (SPREAD_MIN * mean) ** 2:
            slope = (self._xy / self._weight - mean * mean_s) / variance
            latency_s = min(max(0.0, mean_s - slope * mean), LATENCY_SHARE_MAX * mean_s)
        return Speed(latency_s, mean / (mean_s - latency_s))


@dataclass(frozen=True, slots=True)
class PrefillSpeed:
    """What computing costs an engine; what every step costs whatever it computes is left out."""

    tokens_per_s: float
    """Without attention to earlier tokens."""
    attention_s: float = 0.0
    """For one token to attend to one earlier token, all layers."""

    def seconds(self, first_token: int, num_tokens: int) -> float:
        """Time to compute tokens ``first_token .. first_token + num_tokens - 1``."""
        pairs = num_tokens * (first_token + 0.5 * num_tokens)
        return num_tokens / self.tokens_per_s + self.attention_s * pairs


# ---- planning


class Place(Enum):
    """Where a block is, if not in a tier."""

    ENGINE = "engine"
    POOL = "pool"
    ABSENT = "absent"


Location = Place | str
"""A place, or the name of a lower tier."""

Run = tuple[Location, int]
"""So many adjacent blocks, at least 0, that are in the same location."""


@dataclass(frozen=True, slots=True)
class Source:
    """What is known of loading from the pool into the engine, or from a tier into the pool."""

    speed: Speed | None = None
    """None before anything was measured."""
    queued_bytes: int = 0
    """Asked of it by others and not yet delivered."""
    is_explored: bool = False
    """A request that was sent to measure it is still under way."""
    is_stale: bool = False
    """Nothing was measured for a while, so that a bad opinion of it deserves a second look."""


@dataclass(frozen=True, slots=True)
class RequestShape:
    """How large a request and its blocks are."""

    num_tokens: int
    """Of the whole prompt."""
    block_tokens: int
    block_bytes: int
    """Of all ranks together."""


class PlanMode(Enum):
    """Who decides."""

    AUTO = "auto"
    LOAD = "load"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True)
class PlannerSettings:
    """How the choice is made."""

    mode: PlanMode = PlanMode.AUTO
    """``load`` and ``recompute`` pin the choice, whatever was measured."""
    load_share_max: float = 0.9
    """Loading has to take at most this share of the time that computing the same blocks takes."""
    explore_blocks: int = 16
    """Blocks that are loaded from a source to measure it; ``EXPLORE_AGAIN`` times as many if it
    was measured before."""

    def __post_init__(self) -> None:
        """Refuse what can't work.

        Raises:
            InputError: Says which setting, and what it has to be.
        """
        if not 0.0 < self.load_share_max <= 1.0:
            raise InputError(
                "load_share_max must be above 0 and at most 1. "
                f"load_share_max={self.load_share_max}"
            )
        if self.explore_blocks < 1:
            raise InputError(
                f"explore_blocks must be at least 1. explore_blocks={self.explore_blocks}"
            )


@dataclass(frozen=True, slots=True)
class Plan:
    """What to load for one request; everything after it is computed."""

    num_engine: int
    """Leading blocks that the engine has already."""
    num_load: int
    """Blocks to load, following those."""
    num_from_pool: int
    """Of ``num_load``, those that are in the pool; the rest is in tiers."""
    bytes_by_tier: Mapping[str, int]
    """What is read from each tier."""
    load_s: float | None
    """Estimate for ``num_load`` blocks; None if some source was never measured."""
    recompute_s: float
    """Estimate for computing the same blocks instead."""
    explored: Location | None
    """The source that this request measures: tell ``Source.is_explored`` until it has."""
    reason: str
    """For people: what was weighed."""

    @property
    def saved_s(self) -> float | None:
        """Time to first token gained by loading, in seconds; None as for ``load_s``."""
        return None if self.load_s is None else self.recompute_s - self.load_s


@dataclass(slots=True)
class _Walk:
    """The leading blocks from the engine's on, run by run, with what loading up to here costs."""

    shape: RequestShape
    sources: Mapping[Location, Source]
    num_engine: int
    num_blocks: int = 0
    """Walked over, beyond the engine's."""
    num_pool: int = 0
    bytes_by_tier: dict[str, int] = field(default_factory=dict)
    fixed_s: float = 0.0
    """Latencies and queues of the sources used so far."""
    per_block_s: float = 0.0
    """Sum over the blocks of their tiers' time."""
    is_measured: bool = True

    def step(self, location: Location, num_blocks: int) -> None:
        """Load these blocks too; ``location`` is in ``sources``."""
        block_bytes = self.shape.block_bytes
        if not self.num_blocks:
            self._open(Place.POOL)
        if location is Place.POOL:
            self.num_pool += num_blocks
        else:
            name = str(location)
            if name not in self.bytes_by_tier:
                self._open(name)
                self.bytes_by_tier[name] = 0
            self.bytes_by_tier[name] += num_blocks * block_bytes
            speed = self.sources[name].speed
            if speed is not None:
                self.per_block_s += num_blocks * block_bytes / speed.per_s
        self.num_blocks += num_blocks

    def _open(self, location: Location) -> None:
        source = self.sources[location]
        if source.speed is None:
            self.is_measured = False
        else:
            self.fixed_s += source.speed.seconds(source.queued_bytes)

    @property
    def load_s(self) -> float:
        """Time to load what was walked over, as far as it was measured."""
        speed = self.sources[Place.POOL].speed
        if not self.num_blocks or speed is None:
            return self.fixed_s + self.per_block_s
        copied_bytes = self.num_blocks * self.shape.block_bytes
        return self.fixed_s + self.per_block_s + copied_bytes / speed.per_s

    def recompute_s(self, prefill: PrefillSpeed) -> float:
        """Time to compute what was walked over."""
        tokens = self.shape.block_tokens
        return prefill.seconds(self.num_engine * tokens, self.num_blocks * tokens)


def plan(
    runs: Sequence[Run],
    shape: RequestShape,
    sources: Mapping[Location, Source],
    prefill: PrefillSpeed | None,
    settings: PlannerSettings,
) -> Plan:
    """Choose how many leading blocks to load.

    Within a run each further block costs the same to load and saves the same or more, as
    later tokens attend to more: so the best number is at the end of some run, and only those are
    compared, under the margin of ``PlannerSettings.load_share_max``.

    Args:
        runs: Locations of the leading blocks, in order. What the engine has counts at the start
            only, as it can't use a block behind one that has to be loaded or computed.
        shape: Of the request.
        sources: For the pool (into the engine) and each tier (into the pool); blocks in what is
            not named here are absent, and so is everything if the pool is not named.
        prefill: The engine's, None before it was measured.
        settings: How to choose.

    Returns:
        The plan; in time proportional to the number of runs.
    """
    num_engine, loadable = _loadable(runs, sources)
    if not loadable or settings.mode is PlanMode.RECOMPUTE:
        why = "pinned to recompute" if loadable else "nothing to load"
        return Plan(num_engine, 0, 0, {}, 0.0, 0.0, None, why)
    speed = prefill or PrefillSpeed(ASSUMED_PREFILL_TOKENS_PER_S)
    num_runs, explored = len(loadable), None
    if settings.mode is PlanMode.AUTO:
        num_runs = _best(loadable, _Walk(shape, sources, num_engine), speed, settings)
        explored = _to_explore(loadable[num_runs:], sources)
    chosen = _Walk(shape, sources, num_engine)
    for location, num_blocks in loadable[:num_runs]:
        chosen.step(location, num_blocks)
    if explored is not None:
        location, num_blocks = loadable[num_runs]
        is_known = sources[explored].speed is not None
        num_explored = settings.explore_blocks * (EXPLORE_AGAIN if is_known else 1)
        chosen.step(location, min(num_blocks, num_explored))
    recompute_s = chosen.recompute_s(speed)
    return Plan(
        num_engine=num_engine,
        num_load=chosen.num_blocks,
        num_from_pool=chosen.num_pool,
        bytes_by_tier=chosen.bytes_by_tier,
        load_s=chosen.load_s if chosen.is_measured else None,
        recompute_s=recompute_s,
        explored=explored,
        reason=_reason(loadable, chosen, num_runs, explored, settings, speed),
    )


def _loadable(runs: Sequence[Run], sources: Mapping[Location, Source]) -> tuple[int, list[Run]]:
    """The engine's leading blocks, and the runs after them up to the first that can't be loaded."""
    num_engine = 0
    loadable: list[Run] = []
    for location, num_blocks in runs:
        if not num_blocks:
            continue
        if location is Place.ENGINE and not loadable:
            num_engine += num_blocks
        elif location in sources and Place.POOL in sources and location is not Place.ENGINE:
            loadable.append((location, num_blocks))
        else:
            break
    return num_engine, loadable


def _best(
    loadable: Sequence[Run], walk: _Walk, prefill: PrefillSpeed, settings: PlannerSettings
) -> int:
    """The number of runs to load for the least time; what is not measured is not weighed.

    Loading counts ``1 / load_share_max`` times its time: so the whole keeps the margin, and so does
    what the chosen runs add to any fewer of them. A fast run does not pay for a slow one behind it.
    """
    best, best_s = 0, 0.0
    for idx, (location, num_blocks) in enumerate(loadable):
        walk.step(location, num_blocks)
        if not walk.is_measured:
            break
        gained_s = walk.recompute_s(prefill) - walk.load_s / settings.load_share_max
        if gained_s > best_s:
            best, best_s = idx + 1, gained_s
    return best


def _to_explore(rest: Sequence[Run], sources: Mapping[Location, Source]) -> Location | None:
    """The source that a few blocks behind the chosen ones are to measure, if any."""
    if not rest:
        return None
    location = rest[0][0]
    source, pool = sources[location], sources[Place.POOL]
    if source.is_explored or pool.is_explored:
        return None
    if source.speed is None or source.is_stale:
        return location
    return Place.POOL if pool.speed is None else None


def _reason(
    loadable: Sequence[Run],
    chosen: _Walk,
    num_runs: int,
    explored: Location | None,
    settings: PlannerSettings,
    prefill: PrefillSpeed,
) -> str:
    """One line for logs and people."""
    total = sum(num_blocks for _, num_blocks in loadable)
    if settings.mode is PlanMode.LOAD:
        return f"pinned to load: {total} blocks"
    if explored is not None:
        label = explored.value if isinstance(explored, Place) else explored
        return f"{chosen.num_blocks} of {total} blocks are loaded to measure {label}"
    if not num_runs:
        whole = _Walk(chosen.shape, chosen.sources, chosen.num_engine)
        for run in loadable:
            whole.step(*run)
        whole_s = f"{whole.load_s:.3f} s" if whole.is_measured else "an unknown time"
        return (
            f"none of {total} blocks is loaded: all would take {whole_s}, "
            f"computing them {whole.recompute_s(prefill):.3f} s"
        )
    return (
        f"{chosen.num_blocks} of {total} blocks load in {chosen.load_s:.3f} s, "
        f"computing them takes {chosen.recompute_s(prefill):.3f} s"
    )
