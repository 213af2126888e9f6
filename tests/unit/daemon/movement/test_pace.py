"""How much of a prefix is worth waiting for, and for how long."""

import pytest

from kvkeep.core.planner import PlanMode, PlannerSettings
from kvkeep.daemon.movement.pace import LIMIT_MIN_S, LIMIT_PINNED_S, PROBE_S, Pace
from kvkeep.testing.virtual_time import VirtualTime
from tests.unit.daemon.movement.grounds import LAYOUT, Grounds

NUM_BLOCKS = 100
SLOW_ENGINE = 1000.0
"""Tokens a second: 1.6 s for the prefix."""
FAST_ENGINE = 1e8


def paced(grounds: Grounds, bytes_per_s: float | None, mode: PlanMode = PlanMode.AUTO) -> Pace:
    """A pace that has measured the tier, if at all."""
    pace = Pace(PlannerSettings(mode=mode), LAYOUT, VirtualTime())
    if bytes_per_s is not None:
        for num_blocks in (1, 8, 64):
            num_bytes = num_blocks * LAYOUT.block_bytes
            pace.measured(grounds.tier.name, num_bytes, num_bytes / bytes_per_s)
            pace.loaded(num_blocks, num_bytes / 1e9)
    return pace


async def test_a_fast_tier_is_loaded_from(grounds: Grounds) -> None:
    """All of it, the time that it saves is counted, and waiting has an end before computing's."""
    pace = paced(grounds, 1e9)
    pacing = pace.plan(0, NUM_BLOCKS, [(grounds.tier, NUM_BLOCKS)], SLOW_ENGINE)

    recompute_s = NUM_BLOCKS * LAYOUT.block_tokens / SLOW_ENGINE
    assert pacing.num_blocks == NUM_BLOCKS
    assert LIMIT_MIN_S <= pacing.limit_s <= recompute_s
    assert pace.saved_us == pytest.approx(recompute_s * 1e6, rel=0.1)


@pytest.mark.parametrize("engine", [2000.0, 20_000.0, 200_000.0])
async def test_nobody_waits_longer_than_computing_takes(grounds: Grounds, engine: float) -> None:
    """Neither until blocks are found, nor for them, nor for both."""
    pace = paced(grounds, 1e9)
    compute_s = NUM_BLOCKS * LAYOUT.block_tokens / engine
    probe_s, most_s = pace.waits_s(0, NUM_BLOCKS, engine)
    pacing = pace.plan(0, NUM_BLOCKS, [(grounds.tier, NUM_BLOCKS)], engine)

    assert probe_s < compute_s
    assert most_s == pytest.approx(compute_s)
    assert pacing.limit_s <= compute_s
    assert pace.waits_s(NUM_BLOCKS - 1, NUM_BLOCKS, engine)[1] < compute_s
    assert pace.waits_s(0, NUM_BLOCKS, 0.0)[0] == PROBE_S


async def test_a_slow_tier_is_left_alone(grounds: Grounds) -> None:
    """A hit is never slower than a miss."""
    pacing = paced(grounds, 1e4).plan(0, NUM_BLOCKS, [(grounds.tier, NUM_BLOCKS)], FAST_ENGINE)

    assert pacing.num_blocks == 0
    assert "none of 100 blocks is loaded" in pacing.reason


@pytest.mark.parametrize(
    ("bytes_per_s", "engine", "may_pay"),
    [(1e4, FAST_ENGINE, False), (1e9, SLOW_ENGINE, True), (None, SLOW_ENGINE, True)],
)
async def test_what_can_not_pay_is_not_looked_for(
    grounds: Grounds, bytes_per_s: float | None, engine: float, may_pay: bool
) -> None:
    """The question alone changes nothing: a tier that is unknown may still be measured."""
    pace = paced(grounds, bytes_per_s)

    for _ in range(2):
        assert pace.may_pay(10, NUM_BLOCKS, grounds.tier, engine) is may_pay
    assert pace.last_reason.startswith("none of") is not may_pay
    assert pace.saved_us == 0


async def test_an_unknown_tier_is_measured_by_one_at_a_time(grounds: Grounds) -> None:
    """A few blocks, and until they are there nobody else tries."""
    pace = paced(grounds, None)
    runs = [(grounds.tier, NUM_BLOCKS)]
    first = pace.plan(0, NUM_BLOCKS, runs, SLOW_ENGINE)
    assert 0 < first.num_blocks < NUM_BLOCKS
    assert first.explored == grounds.tier.name
    name, num_bytes = grounds.tier.name, first.num_blocks * LAYOUT.block_bytes
    assert pace.is_alone(name)
    pace.begun(name, num_bytes)
    assert not pace.is_alone(name)
    assert pace.plan(0, NUM_BLOCKS, runs, SLOW_ENGINE).num_blocks == 0
    pace.ended(name, num_bytes, None)

    assert pace.is_alone(name)
    assert pace.plan(0, NUM_BLOCKS, runs, SLOW_ENGINE).num_blocks > 0


@pytest.mark.parametrize(
    ("mode", "num_blocks"), [(PlanMode.LOAD, NUM_BLOCKS), (PlanMode.RECOMPUTE, 0)]
)
async def test_a_pinned_choice_is_kept(grounds: Grounds, mode: PlanMode, num_blocks: int) -> None:
    """Whatever was measured; loading still has an end."""
    runs = [(grounds.tier, NUM_BLOCKS)]
    for speed in (None, 1e3, 1e10):
        pacing = paced(grounds, speed, mode).plan(0, NUM_BLOCKS, runs, FAST_ENGINE)
        assert pacing.num_blocks == num_blocks
        assert mode is PlanMode.RECOMPUTE or pacing.limit_s == LIMIT_PINNED_S


async def test_speeds_are_what_was_measured(grounds: Grounds) -> None:
    """Nothing is made up."""
    assert paced(grounds, None).speeds() == {}
    speeds = paced(grounds, 1e8).speeds()

    assert set(speeds) == {"pool", grounds.tier.name}
    assert speeds[grounds.tier.name] == pytest.approx(1e8, rel=0.2)
