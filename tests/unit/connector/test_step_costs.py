"""What is known of an engine's speed, and what is decided by it."""

import pytest

from kvkeep.connector.step_costs import (
    SAMPLES_MIN,
    STALE_S,
    STEP_TOKENS_MIN,
    STEPS_MAX,
    StepCosts,
)


def test_nothing_is_known_before_a_large_step() -> None:
    """What is assumed holds until then; small steps say nothing."""
    costs = StepCosts(16, assumed_tokens_s=500.0)
    costs.begun(1, STEP_TOKENS_MIN - 1, [], 0.0)
    costs.ended(1, 1.0)

    assert costs.tokens_s == 500.0
    assert StepCosts(16).tokens_s == 0.0


def test_the_first_large_step_counts_alone() -> None:
    """What was assumed is forgotten."""
    costs = StepCosts(16, assumed_tokens_s=500.0)
    costs.begun(1, 1000, [], 10.0)
    costs.ended(1, 10.5)

    assert costs.tokens_s == pytest.approx(2000.0)


def test_an_engine_of_small_steps_is_measured_by_its_largest() -> None:
    """As in exact mode, where a step computes one block."""
    costs = StepCosts(32, assumed_tokens_s=10_000.0, step_tokens_max=32)
    costs.begun(1, 31, [], 10.0)
    costs.ended(1, 11.0)
    costs.begun(2, 32, [], 20.0)
    costs.ended(2, 20.5)

    assert costs.tokens_s == pytest.approx(64.0)


def test_a_step_planned_while_another_ran_begins_after_it() -> None:
    """Else each of two overlapping steps would look half as fast."""
    costs = StepCosts(16)
    costs.begun(1, 1000, [], 0.0)
    costs.begun(2, 1000, [], 0.1)
    costs.ended(1, 1.0)
    costs.ended(2, 2.0)

    assert costs.tokens_s == pytest.approx(1000.0)


def test_a_new_speed_is_learned_in_a_few_steps() -> None:
    """The engine may have become slower by half."""
    costs = StepCosts(16)
    for step in range(30):
        costs.begun(step, 1000, [], 2.0 * step)
        costs.ended(step, 2.0 * step + (1.0 if step < 10 else 2.0))

    assert costs.tokens_s == pytest.approx(500.0, rel=0.05)


def test_a_step_whose_report_never_came_is_not_measured() -> None:
    """The report of a later one closes it without counting it."""
    costs = StepCosts(16)
    costs.begun(1, 1000, [], 0.0)
    costs.begun(3, 1000, [], 100.0)
    costs.ended(3, 101.0)

    assert costs.tokens_s == pytest.approx(1000.0)
    assert not costs._begun


def test_steps_without_reports_do_not_pile_up() -> None:
    """An engine that never reports costs a fixed room."""
    costs = StepCosts(16)
    for step in range(10 * STEPS_MAX):
        costs.begun(step, 1000, [], float(step))

    assert len(costs._begun) == STEPS_MAX


# --- Loads ----------------------------------------------------------------------------------------

STEP_S, TOKEN_S = 0.010, 7e-6
LOAD_S, BLOCK_S = 0.0015, 45e-6
"""As on one H200 with a small model: what is fixed outweighs a few hundred tokens."""


def engine_that(num_computed: int, num_loaded: int) -> StepCosts:
    """Costs of an engine that computed and loaded so often, of many lengths; the clock is at 0."""
    costs = StepCosts(16)
    for step in range(num_computed + num_loaded):
        num_tokens = (128, 512, 2048)[step % 3]
        blocks = [num_tokens // 16] if step >= num_computed else []
        computed = 16 if blocks else num_tokens
        seconds = STEP_S + computed * TOKEN_S + sum(LOAD_S + n * BLOCK_S for n in blocks)
        costs.begun(step, computed, blocks, -seconds)
        costs.ended(step, 0.0)
        costs._ended_s = -1.0
    return costs


def test_a_load_that_costs_more_than_computing_is_turned_down() -> None:
    """A step costs the same with a few tokens more, a load does not; long prefixes pay."""
    costs = engine_that(12, 12)

    assert not costs.is_load_worth(128, now_s=0.0)
    assert costs.is_load_worth(2048, now_s=0.0)


@pytest.mark.parametrize("samples", [(0, 0), (12, SAMPLES_MIN - 1), (SAMPLES_MIN - 1, 12)])
def test_what_is_not_known_is_loaded(samples: tuple[int, int]) -> None:
    """A few samples of a machine that was busy decide nothing."""
    assert engine_that(*samples).is_load_worth(16, now_s=0.0)


def test_a_first_load_that_met_a_busy_machine_is_outweighed() -> None:
    """A slow one alone would have every load turned down for as long as nothing is tried."""
    costs = engine_that(12, 0)
    for step in range(100, 100 + SAMPLES_MIN):
        assert costs.is_load_worth(2048, now_s=0.0)
        costs.begun(step, 16, [128], -0.5 if step == 100 else -0.018)
        costs.ended(step, 0.0)
        costs._ended_s = -1.0

    assert costs.is_load_worth(2048, now_s=0.0)


@pytest.mark.parametrize("slower", [1.5, 2.0, 3.0, 5.0, 10.0, 50.0])
@pytest.mark.parametrize("lengths", [(2048,), (2048, 128, 512), (3000, 2048), (512, 2048)])
def test_the_first_load_of_a_process_does_not_have_later_ones_turned_down(
    slower: float, lengths: tuple[int, ...]
) -> None:
    """It meets kernels that are not loaded and memory that was never touched."""
    costs = engine_that(12, 0)
    for number in range(12):
        num_blocks = lengths[number % len(lengths)] // 16
        load_s = (LOAD_S + num_blocks * BLOCK_S) * (1.0 if number else slower)
        costs.begun(100 + number, 16, [num_blocks], -(STEP_S + 16 * TOKEN_S + load_s))
        costs.ended(100 + number, 0.0)
        costs._ended_s = -1.0

        assert costs.is_load_worth(2048, now_s=0.0)


def test_a_load_that_never_pays_is_turned_down_though_the_first_was_not_counted() -> None:
    """One is left out, not all."""
    costs = engine_that(12, SAMPLES_MIN)
    assert costs.is_load_worth(128, now_s=0.0)

    assert not engine_that(12, SAMPLES_MIN + 1).is_load_worth(128, now_s=0.0)


def test_what_was_turned_down_for_long_is_tried_again() -> None:
    """It may be faster by now; one load measures it."""
    costs = engine_that(12, 12)
    assert costs.is_load_worth(128, now_s=STALE_S + 1.0)

    costs.begun(100, 16, [8], STALE_S + 1.0)
    costs.ended(100, STALE_S + 1.013)

    assert not costs.is_load_worth(128, now_s=STALE_S + 2.0)


def test_a_pinned_engine_loads_whatever_was_measured() -> None:
    """For those who want to see loads."""
    costs = engine_that(12, 12)
    costs._is_pinned = True

    assert costs.is_load_worth(16, now_s=0.0)


def test_several_loads_of_one_step_share_its_cost() -> None:
    """Else four small loads would count as one slow one."""
    alone, together = engine_that(12, 0), engine_that(12, 0)
    for step in range(20, 24):
        alone.begun(step, 16, [64], -(STEP_S + LOAD_S))
        together.begun(step, 64, [64] * 4, -(STEP_S + 4 * LOAD_S))
        for costs in (alone, together):
            costs.ended(step, 0.0)
            costs._ended_s = -1.0

    costs_s = [costs._loading.speed() for costs in (alone, together)]
    assert costs_s[0] is not None
    assert costs_s[1] is not None
    assert costs_s[0].seconds(64) == pytest.approx(costs_s[1].seconds(64), rel=0.5)
