"""The queue by example; tests/property/test_router_limits.py has the promises."""

import pytest

from kvkeep.model.errors import InvariantError
from kvkeep.router.limits.admission import AdmissionQueue, Visit, VisitMove, VisitState


def filled(running_max: int, waiting_max: int) -> AdmissionQueue:
    """A queue whose places are all taken by one holder, since 0 s."""
    queue = AdmissionQueue(running_max, waiting_max, wait_s_max=5.0)
    for _ in range(running_max):
        queue.arrive(Visit("first"), 0.0)
    return queue


def test_without_a_limit_all_go_on() -> None:
    """A limit of 0 is none."""
    queue = AdmissionQueue(0, 0, wait_s_max=5.0)
    visits = [Visit("a") for _ in range(100)]
    for visit in visits:
        queue.arrive(visit, 0.0)

    assert {visit.state for visit in visits} == {VisitState.ADMITTED}


def test_who_waits_too_long_is_refused() -> None:
    """At the deadline, not before, the oldest first."""
    queue = filled(1, 2)
    old, young = Visit("a"), Visit("a")
    queue.arrive(old, 1.0)
    queue.arrive(young, 2.0)

    assert list(queue.expire(5.9)) == []
    assert list(queue.expire(6.0)) == [old]
    assert (old.why, young.state) == ("queue_timeout", VisitState.WAITING)


def test_a_full_queue_refuses() -> None:
    """Beyond the queue's bound a request is told at once."""
    queue = filled(1, 1)
    queue.arrive(Visit("a"), 0.0)
    late = Visit("a")
    pushed = queue.arrive(late, 0.0)

    assert (late.state, late.why, list(pushed)) == (VisitState.REFUSED, "queue_full", [])


def test_a_full_queue_drops_the_newest_of_the_greediest() -> None:
    """Who waits with most makes room for who waits with least."""
    queue = filled(1, 3)
    crowd = [Visit("crowd") for _ in range(3)]
    for visit in crowd:
        queue.arrive(visit, 0.0)
    single = Visit("single")
    pushed = queue.arrive(single, 0.0)

    assert list(pushed) == [crowd[2]]
    assert single.state is VisitState.WAITING


def test_who_leaves_while_waiting_lets_nobody_in() -> None:
    """A place in the queue is no place at an engine."""
    queue = filled(1, 3)
    waiting, next_one = Visit("a"), Visit("a")
    queue.arrive(waiting, 0.0)
    queue.arrive(next_one, 0.0)

    assert list(queue.leave(waiting, 1.0)) == []
    assert (queue.num_running, queue.num_waiting) == (1, 1)


def test_retry_after_follows_how_long_visits_last() -> None:
    """Ten who wait for one place of a minute each are not told to come back in a second."""
    queue = AdmissionQueue(1, 10, wait_s_max=1000.0)
    now_s = 0.0
    for _ in range(50):
        visit = Visit("a")
        queue.arrive(visit, now_s)
        now_s += 8.0
        queue.leave(visit, now_s)
    assert queue.retry_after_s() == 8
    queue.arrive(Visit("a"), now_s)
    queue.arrive(Visit("a"), now_s)
    queue.arrive(Visit("a"), now_s)

    assert queue.retry_after_s() == 24


def test_a_visit_ends_once() -> None:
    """Giving a place back twice is a defect, not a second place."""
    visit = Visit("a")
    visit.move(VisitMove.LET_IN, 0.0)
    visit.move(VisitMove.LEFT, 0.0)

    with pytest.raises(InvariantError):
        visit.move(VisitMove.LEFT, 0.0)
