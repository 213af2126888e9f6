"""The planner against brute force, and the measured rate's invariants."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.core.planner import (
    Location,
    MeasuredRate,
    Place,
    PlannerSettings,
    PrefillSpeed,
    RequestShape,
    Run,
    Source,
    Speed,
    plan,
)

SPEEDS = st.builds(Speed, st.floats(0.0, 0.5), st.floats(10.0, 1e5))
SOURCES = st.builds(Source, SPEEDS, st.integers(0, 1000))
PREFILLS = st.builds(PrefillSpeed, st.floats(10.0, 1e5), st.sampled_from([0.0, 1e-7, 1e-4]))
RUNS = st.lists(
    st.tuples(st.sampled_from([Place.POOL, "disk", "valkey"]), st.integers(0, 12)), max_size=6
)


def seconds_to_load(
    num_load: int, locations: list[Location], sources: dict[Location, Source], block_bytes: int
) -> float:
    """The model as documented, block by block."""
    if not num_load:
        return 0.0
    pool = sources[Place.POOL].speed
    assert pool is not None
    total_s = pool.seconds(num_load * block_bytes)
    pool_queue = sources[Place.POOL].queued_bytes
    total_s += pool_queue / pool.per_s
    for name in ("disk", "valkey"):
        num_blocks = locations[:num_load].count(name)
        speed = sources[name].speed
        assert speed is not None
        if num_blocks:
            total_s += speed.seconds(sources[name].queued_bytes + num_blocks * block_bytes)
    return total_s


@given(RUNS, SOURCES, SOURCES, SOURCES, PREFILLS, st.integers(0, 20), st.floats(0.5, 1.0))
def test_the_plan_is_the_best_of_all(
    runs: list[Run],
    pool: Source,
    disk: Source,
    valkey: Source,
    prefill: PrefillSpeed,
    num_engine: int,
    share_max: float,
) -> None:
    """No number of leading blocks is better than the one chosen, and the margin is kept by it."""
    shape = RequestShape(num_tokens=2000, block_tokens=16, block_bytes=10)
    sources: dict[Location, Source] = {Place.POOL: pool, "disk": disk, "valkey": valkey}
    chosen = plan(
        [(Place.ENGINE, num_engine), *runs],
        shape,
        sources,
        prefill,
        PlannerSettings(load_share_max=share_max),
    )
    locations: list[Location] = [place for place, num in runs for _ in range(num)]

    def weighed_s(num_load: int) -> float:
        load_s = seconds_to_load(num_load, locations, sources, 10)
        begun = (num_engine + num_load) * 16
        return load_s / share_max + prefill.seconds(begun, shape.num_tokens - begun)

    best_s = min(weighed_s(num) for num in range(len(locations) + 1))
    num_load = chosen.num_load
    assert weighed_s(num_load) == pytest.approx(best_s, rel=1e-9)
    assert chosen.load_s == pytest.approx(seconds_to_load(num_load, locations, sources, 10))
    assert chosen.load_s is not None
    assert chosen.load_s <= share_max * chosen.recompute_s + 1e-12
    assert chosen.num_from_pool == locations[:num_load].count(Place.POOL)
    assert sum(chosen.bytes_by_tier.values()) == 10 * (num_load - chosen.num_from_pool)


MAYBE_SOURCES = st.builds(
    Source, st.none() | SPEEDS, st.integers(0, 1000), st.booleans(), st.booleans()
)


@given(RUNS, MAYBE_SOURCES, MAYBE_SOURCES, MAYBE_SOURCES, st.none() | PREFILLS)
def test_exploring_is_bounded(
    runs: list[Run], pool: Source, disk: Source, valkey: Source, prefill: PrefillSpeed | None
) -> None:
    """Beyond what is worth it, a few blocks at most are loaded, of a source nobody else tries."""
    shape = RequestShape(num_tokens=2000, block_tokens=16, block_bytes=10)
    sources: dict[Location, Source] = {Place.POOL: pool, "disk": disk, "valkey": valkey}
    settings = PlannerSettings(explore_blocks=2)
    known = {
        place: Source(source.speed, source.queued_bytes, is_explored=True)
        for place, source in sources.items()
    }
    worth = plan(runs, shape, known, prefill, settings)
    chosen = plan(runs, shape, sources, prefill, settings)

    assert worth.explored is None
    if chosen.explored is None:
        assert chosen.num_load == worth.num_load
    else:
        source = sources[chosen.explored]
        assert not source.is_explored
        assert source.speed is None or source.is_stale
        is_known = source.speed is not None
        assert 1 <= chosen.num_load - worth.num_load <= (8 if is_known else 2)


SAMPLES = st.lists(st.tuples(st.floats(1.0, 1e9), st.floats(1e-6, 1e3)), min_size=1, max_size=60)


def measured(samples: list[tuple[float, float]]) -> MeasuredRate:
    rate = MeasuredRate()
    for amount, seconds in samples:
        rate.add(amount, seconds, now_s=0.0)
    return rate


@given(SAMPLES, st.integers(-8, 8), st.integers(-8, 8))
def test_units_do_not_matter(
    samples: list[tuple[float, float]], amount_power: int, seconds_power: int
) -> None:
    """In other units of amount or time, the estimate is the same in those units."""
    per, second = 2.0**amount_power, 2.0**seconds_power  # exact in floating point
    speed = measured(samples).speed()
    scaled = measured([(amount * per, seconds * second) for amount, seconds in samples]).speed()

    assert speed is not None
    assert scaled is not None
    assert scaled.per_s == pytest.approx(speed.per_s * per / second)
    assert scaled.latency_s == pytest.approx(speed.latency_s * second)


@given(SAMPLES)
def test_the_estimate_lies_between_the_samples(samples: list[tuple[float, float]]) -> None:
    """The speed at the mean is between the slowest and the fastest; the rate at most 4 times it."""
    rate = measured(samples)
    speed = rate.speed()
    assert speed is not None
    speeds = [amount / seconds for amount, seconds in samples]
    mean = rate._x / rate._weight
    at_mean = mean / speed.seconds(mean)

    assert min(speeds) * (1 - 1e-6) <= at_mean <= max(speeds) * (1 + 1e-6)
    assert at_mean * (1 - 1e-6) <= speed.per_s <= 4 * at_mean * (1 + 1e-6)
    assert speed.latency_s >= 0


@given(st.floats(0.0, 0.05), st.floats(1e3, 1e6), st.lists(st.floats(500.0, 1e5), min_size=4))
def test_a_line_is_found(latency_s: float, per_s: float, amounts: list[float]) -> None:
    """Samples without noise predict amounts within their range, whatever the order they came in."""
    line = Speed(latency_s, per_s)
    found = measured([(amount, line.seconds(amount)) for amount in amounts]).speed()
    assert found is not None
    largest = max(amounts)

    assert found.seconds(largest) >= line.seconds(largest) * (1 - 1e-6)
