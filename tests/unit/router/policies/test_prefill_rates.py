"""Rates from first bytes: waiting is not slowness."""

import pytest

from kvkeep.router.policies.prefill_rates import RATE_UNKNOWN, PrefillRates


def test_a_queue_does_not_look_like_slowness() -> None:
    """Ten prompts sent at once and answered one a second are each computed in a second."""
    rates = PrefillRates()
    for number in range(1, 11):
        rates.first_byte("e0", 1000, float(number), float(number))

    assert rates.of("e0") == pytest.approx(1000.0)


def test_prompts_of_one_step_count_together() -> None:
    """Two answers at the same moment took the time of one step, not of two."""
    rates = PrefillRates()
    for number in range(1, 40):
        rates.first_byte("e0", 1000, float(number), 1.0)
        rates.first_byte("e0", 1000, float(number), 1.0)

    assert rates.of("e0") == pytest.approx(2000.0, rel=0.1)


def test_an_unmeasured_endpoint_is_like_the_others() -> None:
    """Without any measurement a default holds; with some, their mean; short prompts are none."""
    rates = PrefillRates()
    rates.first_byte("e0", 10, 1.0, 1.0)
    before = rates.of("e1")
    rates.first_byte("e0", 1000, 10.0, 0.5)

    assert before == RATE_UNKNOWN
    assert rates.of("e1") == rates.of("e0") == pytest.approx(2000.0)
    rates.left("e0")
    assert rates.of("e0") == RATE_UNKNOWN
