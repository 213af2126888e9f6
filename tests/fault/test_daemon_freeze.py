"""The daemon freezes, or dies: its clients miss, never wait, and find it again."""

import signal
import time
from collections.abc import Callable

import pytest

from kvkeep.client.prefixes import Answer
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

PATIENCE_S = 0.25
WAIT_S = 0.002
SLACK_S = 0.05
"""What a busy machine may add to a wait; an engine's step may be late by as much."""
REATTACH_S = 5.0
HASHES = hashes_of(0, 100)


def longest_s(work: Callable[[], object], until: Callable[[], bool]) -> float:
    """Call again and again until it is so; returns how long the longest call took."""
    longest = 0.0
    begun_s = time.perf_counter()
    while not until():
        assert time.perf_counter() - begun_s < 10 * PATIENCE_S, "it never became so"
        before_s = time.perf_counter()
        work()
        longest = max(longest, time.perf_counter() - before_s)
    return longest


def test_a_frozen_daemon_is_given_up_within_patience_and_never_waited_for() -> None:
    """No call takes longer than it may; then everything is a miss at once."""
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
        begun_s = time.perf_counter()
        longest = longest_s(
            lambda: client.answer(question, WAIT_S), lambda: not client.is_connected
        )

        assert time.perf_counter() - begun_s < PATIENCE_S + SLACK_S
        assert longest < WAIT_S + SLACK_S
        assert client.ask(NAMESPACE, 0, HASHES) is None
        assert client.answer(question, WAIT_S) is Answer.NOTHING
        assert client.num_late == 1


def test_questions_to_a_frozen_daemon_pile_up_to_a_limit_without_waiting() -> None:
    """However many requests come, asking costs no time, and ends when nobody reads."""
    hashes = hashes_of(0, 5000)
    with running_daemon() as daemon, opened_prefixes(daemon, patience_s=30.0) as client:
        daemon.signal(signal.SIGSTOP)
        longest = longest_s(
            lambda: client.ask(NAMESPACE, 0, hashes), lambda: not client.is_connected
        )

        assert longest < SLACK_S


def test_after_it_goes_on_the_client_is_attached_within_seconds() -> None:
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

        assert wait_until(lambda: client.is_connected, "attached", REATTACH_S) < REATTACH_S
        late = [client.answer(question, 0.1) for question in questions if question is not None]
        assert late == [Answer.NOTHING] * 4
        client.release([kept], num_loaded=1)
        wait_until(lambda: daemon.gauge("read_leases") == 0, "leases of the lost session are over")
        assert load_right_or_not_at_all(worker, client, HASHES) == 100


def test_a_killed_daemon_is_noticed_at_once_and_found_again() -> None:
    """Its end is a miss without any wait; its successor is found within seconds of its start."""
    with running_daemon() as daemon, opened_prefixes(daemon) as client:
        with Worker(daemon) as worker:
            worker.store(HASHES)
        daemon.kill()
        begun_s = time.perf_counter()
        assert acquire(client, HASHES, WAIT_S) is None
        assert time.perf_counter() - begun_s < WAIT_S + SLACK_S
        daemon.start()

        assert wait_until(lambda: client.is_connected, "attached", REATTACH_S) < REATTACH_S
        with Worker(daemon) as worker:
            assert load_right_or_not_at_all(worker, client, HASHES) == 100


def test_a_store_to_a_frozen_daemon_ends_in_time() -> None:
    """A call has a deadline; whoever makes it goes on without."""
    with running_daemon() as daemon, Worker(daemon) as worker:
        daemon.signal(signal.SIGSTOP)
        begun_s = time.perf_counter()
        with pytest.raises(UnavailableError, match="no answer within"):
            worker.connection.call(m.Ping(1), m.Pong, PATIENCE_S)

        assert time.perf_counter() - begun_s < PATIENCE_S + SLACK_S
