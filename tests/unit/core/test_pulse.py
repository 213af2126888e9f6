"""A tier that takes too long to answer is known for it before any deadline."""

import pytest

from kvkeep.core.pulse import PATIENCE_S, PATIENCE_S_MAX, Pulse

DEADLINE_S = 15.0


def pulse(*, latches: bool = True) -> Pulse:
    """Of a tier with the deadline of an object store."""
    return Pulse(DEADLINE_S, latches=latches)


def answer(pulse: Pulse, at_s: float, taken_s: float) -> None:
    """A question that is answered after so long."""
    ticket = pulse.begin(at_s)
    pulse.end(ticket, at_s + taken_s, is_good=True, is_question=True)


def test_a_question_without_an_answer_speaks_against_a_tier() -> None:
    """From its patience on, until a call goes well; an error is no answer."""
    still = pulse()
    ticket = still.begin(0.0)
    assert not still.is_still(PATIENCE_S)
    assert still.is_still(PATIENCE_S + 0.1)
    assert still.look(PATIENCE_S + 0.1)
    assert not still.look(PATIENCE_S + 0.2)
    still.end(ticket, 5.0, is_good=False, is_question=True)
    assert still.is_still(5.0)

    answer(still, 6.0, 0.01)
    assert not still.is_still(6.1)


def test_an_error_that_comes_late_speaks_against_a_tier_though_nobody_looked() -> None:
    """One that comes at once is its breaker's business."""
    still = pulse()
    still.end(still.begin(0.0), 0.01, is_good=False, is_question=True)
    assert not still.is_still(0.02)
    still.end(still.begin(1.0), 1.1 + PATIENCE_S, is_good=False, is_question=True)

    assert still.is_still(100.0)


def test_where_nobody_looks_only_what_is_under_way_counts() -> None:
    """And not beyond the deadline: the breaker lets somebody try again then."""
    still = pulse(latches=False)
    ticket = still.begin(0.0, 2.0)
    assert not still.look(3.0)
    assert (still.is_still(1.9), still.is_still(3.0)) == (False, True)
    assert not still.is_still(DEADLINE_S + 1.0)
    still.end(ticket, DEADLINE_S + 2.0, is_good=False, is_question=False)

    assert not still.is_still(DEADLINE_S + 2.0)


def test_a_tier_far_away_may_take_its_time() -> None:
    """Within a limit; and one answer that took very long does not lift it for ever."""
    far = pulse()
    for number in range(20):
        answer(far, float(number), 0.2)
    assert far.question_s == pytest.approx(2.0, rel=0.1)
    answer(far, 30.0, DEADLINE_S)
    assert far.question_s == PATIENCE_S_MAX
    for number in range(20):
        answer(far, 50.0 + number, 0.01)

    assert far.question_s == PATIENCE_S
