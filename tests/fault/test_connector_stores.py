"""Stores of a rank whose daemon dies, freezes or comes back amid a copy."""

import signal
import time

import pytest

from tests.fault.ranks import HeldRank, held_rank
from tests.fault.writer import running_writer
from tests.integration.daemons import (
    Daemon,
    acquire,
    hashes_of,
    opened_prefixes,
    running_daemon,
    wait_until,
)
from tests.waiting import HANG_S

NUM_BLOCKS = 6
PATIENCE_S = 5.0
"""Of a rank with a frozen daemon."""
CALLER_LIMIT_S = PATIENCE_S - 1.0
"""What a call of the engine's thread may take on a busy machine; waiting would take longer."""


def hold(rank: HeldRank, point: str) -> int:
    """Begin a store and wait until its copy stands still; gives the job's id."""
    rank.mover.hold(point)
    job_id = rank.begin_store(hashes_of(0, NUM_BLOCKS))
    assert rank.mover.reached.wait(HANG_S)
    return job_id


def check_whole_again(daemon: Daemon, rank: HeldRank, first: int = 500) -> None:
    """The rank finds the daemon; what it stores then can be lent and loaded.

    A daemon that is slow to answer, as on a busy machine, costs a store.
    """
    hashes = hashes_of(first, NUM_BLOCKS)
    with opened_prefixes(daemon) as client:

        def is_kept() -> bool:
            wait_until(rank.is_attached, "the daemon is found again")
            rank.store(hashes)
            lease = acquire(client, hashes)
            if lease is None or len(lease.slots) < NUM_BLOCKS:
                return False
            assert rank.load(hashes, lease.slots) == ([], [])
            return True

        wait_until(is_kept, "the blocks are kept")


def timed(call: object) -> float:
    """How long a call takes, in seconds."""
    assert callable(call)
    begun_s = time.perf_counter()
    call()
    return time.perf_counter() - begun_s


@pytest.mark.parametrize("point", ["before", "after"])
def test_a_daemon_killed_amid_a_store_costs_that_store(point: str) -> None:
    """The job is reported once, its blocks are given back, and stores go on with the next one."""
    with running_daemon() as daemon, held_rank(daemon) as rank:
        job_id = hold(rank, point)
        daemon.kill()
        rank.mover.proceed.set()
        wait_until(lambda: rank.has_reported(job_id), "the store is reported")
        assert not rank.is_attached()

        daemon.start()
        check_whole_again(daemon, rank)
        assert rank.reported.count(job_id) == 1
        with opened_prefixes(daemon) as client:
            assert acquire(client, hashes_of(0, NUM_BLOCKS)) is None
        assert daemon.gauge("slots_fenced") == 0


def test_stores_without_a_daemon_are_over_at_once() -> None:
    """While there is nobody to store with, blocks are not held."""
    with running_daemon() as daemon, held_rank(daemon) as rank:
        rank.store(hashes_of(0, 1))
        daemon.kill()
        job_ids = [rank.begin_store(hashes_of(number, 1)) for number in range(10)]
        wait_until(lambda: all(map(rank.has_reported, job_ids)), "all are reported", HANG_S / 2)

        assert sorted(rank.reported) == sorted({*rank.reported})
        daemon.start()
        check_whole_again(daemon, rank)


def test_a_frozen_daemon_holds_nobody_up(waits_s: list[float]) -> None:
    """The engine's thread waits for nothing, and the store is given up in bounded time."""
    with running_daemon() as daemon, held_rank(daemon, patience_s=PATIENCE_S) as rank:
        rank.store(hashes_of(0, 1))
        waits_s.clear()
        daemon.signal(signal.SIGSTOP)
        begun_s = time.perf_counter()
        job_ids = []
        for number in range(5):
            spent_s = timed(
                lambda first=number: job_ids.append(rank.begin_store(hashes_of(first, 2)))
            )
            assert spent_s < CALLER_LIMIT_S
        while not all(job_id in rank.reported for job_id in job_ids):
            assert timed(rank.poll) < CALLER_LIMIT_S
            assert time.perf_counter() - begun_s < HANG_S
        assert not rank.is_attached()
        assert max(waits_s, default=0.0) == 0.0

        daemon.signal(signal.SIGCONT)
        check_whole_again(daemon, rank)
        assert sorted(rank.reported) == sorted({*rank.reported})


def test_a_daemon_frozen_amid_a_store_lends_nothing_wrong() -> None:
    """Frozen between reservation and commit and woken later, it has the whole blocks or none."""
    with running_daemon() as daemon, held_rank(daemon, patience_s=1.0) as rank:
        job_id = hold(rank, "after")
        daemon.signal(signal.SIGSTOP)
        rank.mover.proceed.set()
        wait_until(lambda: rank.has_reported(job_id), "the store is given up")
        daemon.signal(signal.SIGCONT)
        check_whole_again(daemon, rank)

        wait_until(lambda: daemon.gauge("slots_fenced") == 0, "the writer is known to be quiet")
        with opened_prefixes(daemon) as client:
            hashes = hashes_of(0, NUM_BLOCKS)
            lease = acquire(client, hashes)
            if lease is not None:
                assert rank.load(hashes[: len(lease.slots)], lease.slots) == ([], [])


def test_a_commit_after_the_lease_is_refused() -> None:
    """A copy that took longer than its lease is not believed; its slots are free after that."""
    with running_daemon() as daemon, held_rank(daemon, lease_s=1.0) as rank:
        job_id = hold(rank, "before")
        wait_until(lambda: daemon.gauge("slots_fenced") == NUM_BLOCKS, "the lease is over")
        rank.mover.proceed.set()
        wait_until(lambda: rank.has_reported(job_id), "the store is reported")

        assert daemon.counter("stores_fenced") == 1
        assert daemon.gauge("slots_fenced") == 0
        with opened_prefixes(daemon) as client:
            assert acquire(client, hashes_of(0, NUM_BLOCKS)) is None
        check_whole_again(daemon, rank)


def test_a_late_copy_lands_in_no_slot_that_was_lent_anew() -> None:
    """Over a daemon's death a held copy keeps its slots until the rank has said that it ended.

    Another engine is given every slot but those.
    """
    with running_daemon() as daemon, held_rank(daemon) as rank:
        job_id = hold(rank, "before")
        held = set(rank.mover.slots)
        daemon.kill()
        daemon.start()
        assert daemon.gauge("slots_fenced") == NUM_BLOCKS + 1  # and the canary's
        num_slots = daemon.gauge("slots")
        with running_writer(daemon, num_slots, 30.0) as writer:
            given = set(writer.hear()["slots"])
            assert len(given & set(range(num_slots))) > num_slots - 2 * NUM_BLOCKS
            assert not given & held
            assert daemon.gauge("workers") == 1
            assert not rank.has_reported(job_id)

            rank.mover.proceed.set()
            wait_until(lambda: daemon.gauge("workers") == 2, "the rank says hello")
            assert daemon.gauge("slots_fenced") == 0
            writer.tell("go on")
            assert writer.hear() == {"num_ready": len(given) - 1, "is_fenced": False}

        wait_until(lambda: rank.has_reported(job_id), "the store is reported")
        assert rank.reported == [job_id]
        assert daemon.counter("blocks_corrupt") == 0


def test_a_canary_runs_under_its_own_session_only() -> None:
    """Its slot is lent until the session ends; after that it may be anybody's."""
    with running_daemon() as daemon, held_rank(daemon) as rank:
        pool = rank.attachment.pool
        assert pool is not None
        pool.is_proven = False
        daemon.kill()
        rank.attachment.link.lost(pool.connection, "killed")
        assert rank.side.prove_pool() is None

        daemon.start()
        wait_until(rank.is_attached, "the daemon is found again")
        assert rank.side.prove_pool() is not None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_jobs_are_reported_even_after_the_thread_died() -> None:
    """An error that nobody foresaw ends storing, and no block stays held for it."""
    with running_daemon() as daemon, held_rank(daemon) as rank:
        rank.mover.error = ZeroDivisionError()
        job_ids = [rank.begin_store(hashes_of(number, 1)) for number in range(4)]
        wait_until(lambda: all(map(rank.has_reported, job_ids)), "all are reported")
        late = rank.begin_store(hashes_of(9, 1))
        wait_until(lambda: rank.has_reported(late), "a later one too")

        assert sorted(rank.reported) == [*job_ids, late]


def test_a_rank_of_another_namespace_stores_nothing() -> None:
    """Halves that derived different names have nothing to say to each other."""
    with running_daemon() as daemon, held_rank(daemon) as rank:
        job_id = rank.begin_store(hashes_of(0, NUM_BLOCKS), base=b"x" * 32)
        assert rank.has_reported(job_id)

        assert daemon.counter("blocks_stored") == 0
        rank.store(hashes_of(0, NUM_BLOCKS))
        with opened_prefixes(daemon) as client:
            hashes = hashes_of(0, NUM_BLOCKS)
            lease = acquire(client, hashes)
            assert lease is not None
            bad, corrupt = rank.load(hashes, lease.slots, base=b"x" * 32)
            assert (bad, corrupt) == (list(range(NUM_BLOCKS)), [])
            assert rank.load(hashes, lease.slots) == ([], [])
