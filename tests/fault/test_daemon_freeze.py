"""The daemon freezes, or dies: its clients miss, never wait, and find it again."""

import signal
import time
from collections.abc import Callable

import pytest

from kvkeep.client.prefixes import Answer
from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import UnavailableError
from kvkeep.protocol import messages as m
from tests.integration.daemons import (
    NAMESPACE,
    Worker,
    acquire,
    hashes_of,
    load_right_or_not_at_all,
    opened_prefixes,
    running_daemon,
    wait_until,
)
from tests.waiting import HANG_S

PATIENCE_S = 0.25
WAIT_S = 0.002
HASHES = hashes_of(0, 100)


def repeat(work: Callable[[], object], until: Callable[[], bool]) -> None:
    """Call again and again until it is so."""
    begun_s = time.perf_counter()
    while not until():
        assert time.perf_counter() - begun_s < HANG_S, "it never became so"
        work()


def test_a_frozen_daemon_is_given_up_within_patience_and_never_waited_for(
    waits_s: list[float],
) -> None:
    """No call waits longer than it may, the first one after patience gives up; then all misses."""
    clock = SystemClock()
    with (
        running_daemon() as daemon,
        Worker(daemon) as worker,
        opened_prefixes(daemon, patience_s=PATIENCE_S) as client,
    ):
        worker.store(HASHES)
        assert acquire(client, HASHES) is not None
        daemon.signal(signal.SIGSTOP)
        question = client.ask(NAMESPACE, 0, HASHES)
        assert question is not None
        waits_s.clear()
        patient_s = [question.asked_s]

        def look() -> None:
            begun_s = clock.now_s()
            if client.answer(question, WAIT_S) is Answer.PENDING:
                patient_s.append(begun_s)

        repeat(look, lambda: not client.is_connected)

        assert max(patient_s) - question.asked_s < PATIENCE_S
        assert clock.now_s() - question.asked_s >= PATIENCE_S
        assert max(waits_s) <= WAIT_S
        assert client.ask(NAMESPACE, 0, HASHES) is None
        assert client.answer(question, WAIT_S) is Answer.NOTHING
        assert client.num_late == 1


def test_questions_to_a_frozen_daemon_pile_up_to_a_limit_without_waiting(
    waits_s: list[float],
) -> None:
    """However many requests come, asking costs no time, and ends when nobody reads."""
    hashes = hashes_of(0, 5000)
    with running_daemon() as daemon, opened_prefixes(daemon, patience_s=30.0) as client:
        daemon.signal(signal.SIGSTOP)
        repeat(lambda: client.ask(NAMESPACE, 0, hashes), lambda: not client.is_connected)

        assert max(waits_s, default=0.0) == 0.0


def test_after_it_goes_on_the_client_is_attached_again() -> None:
    """Late answers are nobody's: old questions stay unanswered, old leases are over."""
    with (
        running_daemon() as daemon,
        Worker(daemon) as worker,
        opened_prefixes(daemon, patience_s=PATIENCE_S) as client,
    ):
        worker.store(HASHES)
        kept = acquire(client, HASHES)
        assert kept is not None
        daemon.signal(signal.SIGSTOP)
        questions = [client.ask(NAMESPACE, 0, HASHES) for _ in range(4)]
        for question in questions:
            assert question is not None
            while client.answer(question, WAIT_S) is Answer.PENDING:
                pass
        daemon.signal(signal.SIGCONT)

        wait_until(lambda: client.is_connected, "attached")
        late = [client.answer(question, 0.1) for question in questions if question is not None]
        assert late == [Answer.NOTHING] * 4
        client.release([kept], num_loaded=1)
        wait_until(lambda: daemon.gauge("read_leases") == 0, "leases of the lost session are over")
        assert load_right_or_not_at_all(worker, client, HASHES) == 100


def test_a_killed_daemon_is_noticed_at_once_and_found_again(waits_s: list[float]) -> None:
    """Its end is a miss without any wait; its successor is found."""
    with running_daemon() as daemon, opened_prefixes(daemon) as client:
        with Worker(daemon) as worker:
            worker.store(HASHES)
        daemon.kill()
        waits_s.clear()
        assert acquire(client, HASHES, WAIT_S) is None
        assert max(waits_s, default=0.0) <= WAIT_S
        daemon.start()

        wait_until(lambda: client.is_connected, "attached")
        with Worker(daemon) as worker:
            assert load_right_or_not_at_all(worker, client, HASHES) == 100


def test_a_store_to_a_frozen_daemon_ends_in_time(waits_s: list[float]) -> None:
    """A call has a deadline; whoever makes it goes on without."""
    with running_daemon() as daemon, Worker(daemon) as worker:
        daemon.signal(signal.SIGSTOP)
        waits_s.clear()
        with pytest.raises(UnavailableError, match="no answer within"):
            worker.connection.call(m.Ping(1), m.Pong, PATIENCE_S)

        assert sum(waits_s) <= 2 * PATIENCE_S
