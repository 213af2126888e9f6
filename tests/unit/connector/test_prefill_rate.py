"""What is known of an engine's prefill speed."""

import pytest

from kvkeep.connector.prefill_rate import STEP_TOKENS_MIN, STEPS_MAX, PrefillRate


def test_nothing_is_known_before_a_large_step() -> None:
    """What is assumed holds until then; small steps say nothing."""
    rate = PrefillRate(500.0)
    rate.begun(1, STEP_TOKENS_MIN - 1, 0.0)
    rate.ended(1, 1.0)

    assert rate.tokens_s == 500.0
    assert PrefillRate().tokens_s == 0.0


def test_the_first_large_step_counts_alone() -> None:
    """What was assumed is forgotten."""
    rate = PrefillRate(500.0)
    rate.begun(1, 1000, 10.0)
    rate.ended(1, 10.5)

    assert rate.tokens_s == pytest.approx(2000.0)


def test_an_engine_of_small_steps_is_measured_by_its_largest() -> None:
    """As in exact mode, where a step computes one block."""
    rate = PrefillRate(10_000.0, step_tokens_max=32)
    rate.begun(1, 31, 10.0)
    rate.ended(1, 11.0)
    rate.begun(2, 32, 20.0)
    rate.ended(2, 20.5)

    assert rate.tokens_s == pytest.approx(64.0)


def test_a_step_planned_while_another_ran_begins_after_it() -> None:
    """Else each of two overlapping steps would look half as fast."""
    rate = PrefillRate()
    rate.begun(1, 1000, 0.0)
    rate.begun(2, 1000, 0.1)
    rate.ended(1, 1.0)
    rate.ended(2, 2.0)

    assert rate.tokens_s == pytest.approx(1000.0)


def test_a_new_speed_is_learned_in_a_few_steps() -> None:
    """The engine may have become slower by half."""
    rate = PrefillRate()
    for step in range(20):
        rate.begun(step, 1000, 2.0 * step)
        rate.ended(step, 2.0 * step + (1.0 if step < 10 else 2.0))

    assert rate.tokens_s == pytest.approx(500.0, rel=0.05)


def test_a_step_whose_report_never_came_is_not_measured() -> None:
    """The report of a later one closes it without counting it."""
    rate = PrefillRate()
    rate.begun(1, 1000, 0.0)
    rate.begun(3, 1000, 100.0)
    rate.ended(3, 101.0)

    assert rate.tokens_s == pytest.approx(1000.0)
    assert not rate._begun


def test_steps_without_reports_do_not_pile_up() -> None:
    """An engine that never reports costs a fixed room."""
    rate = PrefillRate()
    for step in range(10 * STEPS_MAX):
        rate.begun(step, 1000, float(step))

    assert len(rate._begun) == STEPS_MAX
