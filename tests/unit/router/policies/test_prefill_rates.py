"""Rates from first bytes: waiting is not slowness, and no verdict is for ever."""

import pytest

from kvkeep.router.policies.prefill_rates import (
    FADE_S,
    RATE_UNKNOWN,
    SLOWER_MAX,
    PrefillRates,
)


def measured(rate: float, *, num_prompts: int = 40) -> PrefillRates:
    """Two endpoints, of which e0 computes at this rate and e1 at 1,000 tokens a second."""
    rates = PrefillRates()
    for number in range(1, num_prompts + 1):
        rates.first_byte("e0", 4000, 4.0 * number, min(4.0, 4000 / rate))
        rates.first_byte("e1", 4000, 4.0 * number, 4.0)
    return rates


def test_a_queue_does_not_look_like_slowness() -> None:
    """Prompts sent at once and answered one a second are each computed in a second."""
    rates = PrefillRates()
    for number in range(1, 41):
        rates.first_byte("e0", 1000, float(number), float(number))

    assert rates.of(["e0"], 40.0) == pytest.approx([1000.0])


def test_prompts_of_one_step_count_together() -> None:
    """Two answers at the same moment took the time of one step, not of two."""
    rates = PrefillRates()
    for number in range(1, 41):
        rates.first_byte("e0", 1000, float(number), 1.0)
        rates.first_byte("e0", 1000, float(number), 1.0)

    assert rates.of(["e0"], 40.0) == pytest.approx([2000.0], rel=0.1)


def test_the_faster_one_is_known() -> None:
    """Measured long enough, an endpoint that is twice as fast is thought to be nearly so."""
    fast, slow = measured(2000.0).of(["e0", "e1"], 160.0)

    assert 1.5 < fast / slow < 2.1


def test_no_verdict_is_final() -> None:
    """However slow it seemed, an endpoint counts as half as fast as the mean; in time, as fast."""
    rates = PrefillRates()
    for number in range(1, 41):
        rates.first_byte("e0", 300, 20.0 * number, 20.0)
        rates.first_byte("e1", 8000, 20.0 * number, 1.0)
    at_once = rates.of(["e0", "e1", "new"], 800.0)
    later = rates.of(["e0", "new"], 800.0 + 10 * FADE_S)

    assert at_once[0] == pytest.approx(at_once[2] / SLOWER_MAX)
    assert later[0] == pytest.approx(later[1], rel=0.01)


def test_an_unmeasured_endpoint_is_like_the_others() -> None:
    """Without any measurement a default holds; with some, their mean; short prompts are none."""
    rates = PrefillRates()
    rates.first_byte("e0", 10, 1.0, 1.0)
    before = rates.of(["e1"], 1.0)
    rates.first_byte("e0", 1000, 10.0, 0.5)

    assert before == [RATE_UNKNOWN]
    assert rates.of(["e1", "e0"], 10.0) == pytest.approx([2000.0, 2000.0])
    rates.left("e0")
    assert rates.of(["e0"], 10.0) == [RATE_UNKNOWN]
