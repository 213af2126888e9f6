"""When a tier is left alone and when it is tried again."""

from collections.abc import Callable

import pytest

from kvkeep.core.breaker import TRANSITIONS, Breaker, BreakerMove, BreakerState
from kvkeep.model.errors import InvariantError

PAUSE_S = 2.0


@pytest.fixture
def breaker() -> Breaker:
    """Opens at the third failure in a row."""
    return Breaker(failures_max=3, pause_s=PAUSE_S)


def begun(breaker: Breaker, now_s: float = 0.0) -> int:
    """A ticket; there must be one."""
    ticket = breaker.begin(now_s)
    assert ticket is not None
    return ticket


def opened(breaker: Breaker) -> Breaker:
    """Open since second 10."""
    breaker.give_up(begun(breaker), 10.0)
    return breaker


def test_it_opens_after_failures_in_a_row(breaker: Breaker) -> None:
    """Not before the last of them, and then nobody is let through."""
    states = []
    for _ in range(3):
        breaker.fail(begun(breaker), 0.0)
        states.append(breaker.state)

    assert states == [BreakerState.CLOSED, BreakerState.CLOSED, BreakerState.OPEN]
    assert breaker.begin(PAUSE_S - 0.01) is None
    assert breaker.num_trips == 1


def test_a_success_between_failures_starts_anew(breaker: Breaker) -> None:
    """Two failures, a success and two failures are no three in a row."""
    for _ in range(2):
        breaker.fail(begun(breaker), 0.0)
        breaker.fail(begun(breaker), 0.0)
        breaker.finish(begun(breaker))

    assert breaker.state is BreakerState.CLOSED


def test_one_overdue_call_opens_it(breaker: Breaker) -> None:
    """Whoever came next would wait as long."""
    breaker.give_up(begun(breaker), 0.0)

    assert breaker.state is BreakerState.OPEN


def test_after_the_pause_one_is_let_through(breaker: Breaker) -> None:
    """And no second before the first has told how it went."""
    opened(breaker)

    assert not breaker.is_admitting(11.99)
    assert breaker.is_admitting(12.0)
    assert breaker.begin(12.0) is not None
    assert breaker.state is BreakerState.HALF_OPEN
    assert breaker.begin(12.0) is None
    assert not breaker.is_admitting(99.0)


def test_a_trial_that_goes_well_closes_it(breaker: Breaker) -> None:
    """And old failures are forgotten."""
    breaker.finish(begun(opened(breaker), 12.0))
    breaker.fail(begun(breaker), 12.0)
    breaker.fail(begun(breaker), 12.0)

    assert breaker.state is BreakerState.CLOSED


@pytest.mark.parametrize("report", [Breaker.fail, Breaker.give_up])
def test_a_trial_that_goes_wrong_opens_it_for_another_pause(
    breaker: Breaker, report: Callable[[Breaker, int, float], None]
) -> None:
    """One failure is enough."""
    report(breaker, begun(opened(breaker), 12.0), 12.5)

    assert breaker.state is BreakerState.OPEN
    assert breaker.begin(14.0) is None
    assert breaker.begin(14.5) is not None


def test_calls_from_before_say_nothing_about_now(breaker: Breaker) -> None:
    """A call that hung and comes back decides nothing, neither well nor badly."""
    late = begun(breaker)
    trial = begun(opened(breaker), 12.0)
    breaker.finish(late)
    breaker.fail(late, 12.0)
    breaker.give_up(late, 12.0)

    assert breaker.state is BreakerState.HALF_OPEN
    assert not breaker.is_current(late)
    assert breaker.is_current(trial)


def test_every_state_can_be_left() -> None:
    """There is no dead end, and every move is used."""
    assert set(TRANSITIONS) == set(BreakerState)
    assert {move for row in TRANSITIONS.values() for move in row} == set(BreakerMove)


def test_an_illegal_move_is_a_defect(breaker: Breaker) -> None:
    """The table decides, not the caller."""
    with pytest.raises(InvariantError, match="illegal move"):
        breaker._move(BreakerMove.TRIAL_FINISHED)
