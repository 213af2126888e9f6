"""How many leading blocks are loaded, from where, and why."""

import sys
from types import FrameType
from typing import Any

import pytest

from kvkeep.core.planner import (
    EXPLORE_AGAIN,
    Location,
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
from kvkeep.model.errors import InputError

POOL, ENGINE, ABSENT = Place.POOL, Place.ENGINE, Place.ABSENT
MIB = 1 << 20
SHAPE = RequestShape(num_tokens=10_010, block_tokens=16, block_bytes=MIB)
PREFILL = PrefillSpeed(tokens_per_s=16_000.0)  # one block in a millisecond
FAST = Source(Speed(0.001, 10_000.0 * MIB))
SLOW = Source(Speed(0.001, 500.0 * MIB))


def choose(
    runs: list[Run],
    sources: dict[Location, Source],
    prefill: PrefillSpeed | None = PREFILL,
    **settings: object,
) -> Plan:
    return plan(runs, SHAPE, sources, prefill, PlannerSettings(**settings))  # type: ignore[arg-type]


def test_all_is_loaded_where_loading_is_faster() -> None:
    """What the pool has is loaded behind what the engine has, and the gain is told in seconds."""
    chosen = choose([(ENGINE, 25), (POOL, 600), (ABSENT, 10)], {POOL: FAST})

    assert (chosen.num_engine, chosen.num_load, chosen.num_from_pool) == (25, 600, 600)
    assert chosen.load_s == pytest.approx(0.001 + 0.06)
    assert chosen.recompute_s == pytest.approx(0.6)
    assert chosen.saved_s == pytest.approx(0.539)
    assert chosen.bytes_by_tier == {}
    assert "600 of 600 blocks load in 0.061 s" in chosen.reason


def test_a_slow_tier_behind_the_pool_is_left() -> None:
    """A fast start does not pay for a slow end: only the pool's blocks are loaded."""
    sources: dict[Location, Source] = {POOL: FAST, "disk": SLOW}
    chosen = choose([(POOL, 300), ("disk", 300)], sources)

    assert (chosen.num_load, chosen.num_from_pool) == (300, 300)


def test_a_tier_is_read_where_that_pays() -> None:
    """Bytes are reckoned per tier, and through the pool into the engine."""
    disk = Source(Speed(0.01, 4_000.0 * MIB), queued_bytes=40 * MIB)
    chosen = choose([(POOL, 100), ("disk", 400), (ABSENT, 1)], {POOL: FAST, "disk": disk})

    assert (chosen.num_load, chosen.num_from_pool) == (500, 100)
    assert chosen.bytes_by_tier == {"disk": 400 * MIB}
    assert chosen.load_s == pytest.approx(0.001 + 0.05 + 0.01 + 0.01 + 0.1)


def test_a_long_queue_turns_the_choice() -> None:
    """What others asked of a tier before is waited for."""
    speed = Speed(0.01, 4_000.0 * MIB)
    runs: list[Run] = [("disk", 100)]
    idle = choose(runs, {POOL: FAST, "disk": Source(speed)})
    busy = choose(runs, {POOL: FAST, "disk": Source(speed, queued_bytes=400 * MIB)})

    assert (idle.num_load, busy.num_load) == (100, 0)
    assert "none of 100 blocks" in busy.reason


def test_the_margin_is_kept() -> None:
    """Loading that gains less than the margin is not worth the risk."""
    runs: list[Run] = [(POOL, 100)]
    pool = Source(Speed(0.0, 1050.0 * MIB))  # 0.95 of the time that computing takes

    assert choose(runs, {POOL: pool}).num_load == 0
    assert choose(runs, {POOL: pool}, load_share_max=1.0).num_load == 100


def test_attention_makes_late_blocks_worth_more() -> None:
    """Tokens far back cost more to compute, so that a slow tier pays there and not in front."""
    prefill = PrefillSpeed(16_000.0, attention_s=1e-8)
    sources: dict[Location, Source] = {POOL: FAST, "disk": Source(Speed(0.0, 950.0 * MIB))}

    assert choose([("disk", 100)], sources, prefill).num_load == 0
    assert choose([(ENGINE, 500), ("disk", 100)], sources, prefill).num_load == 100


def test_nothing_behind_a_hole_is_loaded() -> None:
    """Blocks after an absent one, or in a place that can't be read now, are computed."""
    hole = choose([(POOL, 50), (ABSENT, 1), (POOL, 500)], {POOL: FAST})
    down = choose([(POOL, 50), ("disk", 100), (POOL, 500)], {POOL: FAST})
    engine_later = choose([(POOL, 50), (ENGINE, 5), (POOL, 500)], {POOL: FAST})
    no_pool = choose([("disk", 100)], {"disk": FAST})

    assert [one.num_load for one in (hole, down, engine_later, no_pool)] == [50, 50, 50, 0]
    assert no_pool.reason == "nothing to load"


def test_the_choice_can_be_pinned() -> None:
    """Pinned, nothing that was measured matters, but the estimates are told all the same."""
    runs: list[Run] = [(POOL, 100), ("disk", 100)]
    sources: dict[Location, Source] = {POOL: FAST, "disk": SLOW}
    load = choose(runs, sources, mode=PlanMode.LOAD)
    recompute = choose(runs, sources, mode=PlanMode.RECOMPUTE)

    assert (load.num_load, load.num_from_pool) == (200, 100)
    assert load.saved_s is not None
    assert load.saved_s < 0
    assert recompute.num_load == 0
    assert choose(runs, {POOL: Source(), "disk": SLOW}, mode=PlanMode.LOAD).saved_s is None


def test_an_unmeasured_source_is_tried_by_one_request() -> None:
    """A few blocks are loaded to measure it; requests that come meanwhile compute."""
    runs: list[Run] = [(POOL, 100), ("disk", 100)]
    first = choose(runs, {POOL: FAST, "disk": Source()})
    meanwhile = choose(runs, {POOL: FAST, "disk": Source(is_explored=True)})

    assert (first.num_load, first.num_from_pool, first.explored) == (116, 100, "disk")
    assert first.load_s is None
    assert first.saved_s is None
    assert "measure disk" in first.reason
    assert (meanwhile.num_load, meanwhile.explored) == (100, None)


def test_an_unmeasured_pool_is_tried_first() -> None:
    """Nothing is known of copies into the engine: a few blocks, whichever tier they are in."""
    in_pool = choose([(POOL, 100)], {POOL: Source()})
    in_tier = choose([("disk", 100)], {POOL: Source(), "disk": FAST})

    assert (in_pool.num_load, in_pool.explored) == (16, POOL)
    assert (in_tier.num_load, in_tier.explored) == (16, POOL)


def test_a_bad_opinion_grows_old() -> None:
    """A source that was found slow is tried again after a while, with more blocks than at first."""
    stale = Source(SLOW.speed, is_stale=True)
    refused = choose([("disk", 500)], {POOL: FAST, "disk": SLOW})
    again = choose([("disk", 500)], {POOL: FAST, "disk": stale})
    good = choose([("disk", 500)], {POOL: FAST, "disk": Source(FAST.speed, is_stale=True)})

    assert (refused.num_load, refused.explored) == (0, None)
    assert (again.num_load, again.explored) == (16 * EXPLORE_AGAIN, "disk")
    assert (good.num_load, good.explored) == (500, None)


def test_an_unmeasured_engine_counts_as_fast() -> None:
    """Before an engine's rate is known, only what beats a very fast engine is loaded."""
    fast = choose([(POOL, 600)], {POOL: Source(Speed(0.0, 50_000.0 * MIB))}, None)
    slow = choose([(POOL, 600)], {POOL: SLOW}, None)

    assert (fast.num_load, slow.num_load) == (600, 0)


def num_lines_of_plan(scale: int) -> int:
    """Lines of Python that a plan over four runs takes, ``scale`` times as long as short ones."""
    lengths: list[Run] = [(ENGINE, 1), (POOL, 8), ("disk", 12), ("valkey", 4)]
    runs: list[Run] = [(location, num_blocks * scale) for location, num_blocks in lengths]
    sources: dict[Location, Source] = {POOL: FAST, "disk": FAST, "valkey": SLOW}
    num_lines = 0

    def count(_frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal num_lines
        num_lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        plan(runs, SHAPE, sources, PREFILL, PlannerSettings())
    finally:
        sys.settrace(before)
    return num_lines


def test_a_plan_for_ten_thousand_tokens_takes_no_time() -> None:
    """625 blocks in four runs are planned in a few hundred lines, as 25 blocks are."""
    assert num_lines_of_plan(25) <= 2 * num_lines_of_plan(1) < 1000


@pytest.mark.parametrize(
    ("name", "value"), [("load_share_max", 0.0), ("load_share_max", 1.1), ("explore_blocks", 0)]
)
def test_a_bad_setting_is_named(name: str, value: float) -> None:
    """A setting that can't work is refused with its name."""
    with pytest.raises(InputError, match=name):
        PlannerSettings(**{name: value})  # type: ignore[arg-type]


# ---- measuring


def measured(samples: list[tuple[float, float]]) -> Speed:
    rate = MeasuredRate()
    for amount, seconds in samples:
        rate.add(amount, seconds, now_s=1.0)
    speed = rate.speed()
    assert speed is not None
    return speed


def test_latency_and_rate_are_told_apart() -> None:
    """Samples of unequal size lie on a line, and the line is found."""
    speed = measured([(n, 0.05 + n / 1000.0) for n in (10, 40, 100, 20, 80, 160)])

    assert speed.latency_s == pytest.approx(0.05)
    assert speed.per_s == pytest.approx(1000.0)


def test_equal_samples_are_all_rate() -> None:
    """From samples of one size no latency can be told, so larger ones are not promised too much."""
    speed = measured([(100, 0.15)] * 5)

    assert speed.latency_s == 0.0
    assert speed.per_s == pytest.approx(100 / 0.15)


def test_an_outlier_counts_for_little() -> None:
    """One sample a thousand times slower hardly moves what ten others said, then or later."""
    usual = [(100.0, 0.1)] * 10

    assert measured([*usual, (100.0, 100.0)]).seconds(100.0) < 0.2
    assert measured([*usual, (100.0, 100.0), *usual]).seconds(100.0) == pytest.approx(0.1, rel=0.15)


def test_a_tiny_sample_counts_for_little() -> None:
    """A sample of one block that took a latency alone says nothing of the rate."""
    speed = measured([(100.0, 0.1), (120.0, 0.12), (1.0, 0.02), (110.0, 0.11)])

    assert speed.seconds(100.0) == pytest.approx(0.1, rel=0.1)


def test_a_flood_of_tiny_samples_leaves_the_rate() -> None:
    """Hundreds of single blocks don't make a long prefix look slow."""
    line = Speed(0.01, 1000.0)
    usual = [(amount, line.seconds(amount)) for amount in (600.0, 300.0, 500.0)]
    speed = measured([*usual, *[(1.0, line.seconds(1.0))] * 300])

    assert speed.seconds(600.0) == pytest.approx(line.seconds(600.0), rel=0.1)


@pytest.mark.parametrize("factor", [0.05, 20.0])
def test_news_is_believed_the_third_time(factor: float) -> None:
    """A source that became much slower or faster is judged by its new speed after three samples."""
    before = [(100.0, 0.1), (50.0, 0.05)] * 20
    after = [(100.0, 0.1 * factor)] * 3
    speed = measured(before + after)

    assert speed.seconds(100.0) == pytest.approx(0.1 * factor)


def test_a_sample_of_nothing_is_ignored() -> None:
    """No bytes, no time, or no number: nothing can be learned."""
    rate = MeasuredRate()
    for amount, seconds in ((0, 1), (1, 0), (-1, 1), (float("inf"), 1), (1, float("nan"))):
        rate.add(amount, seconds, now_s=5.0)

    assert rate.speed() is None
    assert rate.num_samples == 0
    with pytest.raises(ValueError, match="half_life_samples"):
        MeasuredRate(half_life_samples=0)
