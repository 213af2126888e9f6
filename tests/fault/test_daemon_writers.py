"""Writers that freeze or die: no late write lands in a slot that somebody else was given."""

import signal

from kvkeep.protocol.codec import split_slots
from tests.fault.writer import FIRST, running_writer
from tests.integration.daemons import (
    Daemon,
    Worker,
    acquire,
    hashes_of,
    load_right_or_not_at_all,
    opened_prefixes,
    running_daemon,
    wait_until,
)

NUM_BLOCKS = 10
LEASE_S = 0.5


def fill(worker: Worker, num_blocks: int) -> set[int]:
    """Store as many blocks, and return every slot that was given out for them."""
    given = set()
    for start in range(0, num_blocks, 50):
        hashes = hashes_of(start, 50)
        reserved = worker.reserve(hashes)
        slots = split_slots(reserved.slots)
        worker.copy(hashes, slots)
        worker.commit(reserved)
        given |= set(slots)
    return given


def num_slots(daemon: Daemon) -> int:
    """Of the pool."""
    return daemon.gauge("slots")


def test_a_frozen_writers_slots_are_given_to_nobody() -> None:
    """Past its deadline they stay behind a fence; its late commit is refused and frees them."""
    with running_daemon() as daemon, running_writer(daemon, NUM_BLOCKS, LEASE_S) as writer:
        frozen = set(writer.hear()["slots"])
        writer.signal(signal.SIGSTOP)
        wait_until(lambda: daemon.gauge("slots_fenced") == NUM_BLOCKS, "the lease is over")

        with Worker(daemon) as worker, opened_prefixes(daemon) as client:
            num_blocks = num_slots(daemon) + 100
            given = fill(worker, num_blocks)
            assert len(given) > num_slots(daemon) - 2 * NUM_BLOCKS
            assert not given & frozen

            writer.signal(signal.SIGCONT)
            writer.tell("go on")
            assert writer.hear() == {"num_ready": 0, "is_fenced": True}
            assert daemon.gauge("slots_fenced") == 0
            assert daemon.counter("stores_fenced") == 1
            assert acquire(client, hashes_of(FIRST, NUM_BLOCKS)) is None
            kept = hashes_of(200, num_blocks - 200)
            assert load_right_or_not_at_all(worker, client, kept) == len(kept)
            assert daemon.counter("blocks_corrupt") == 0


def test_a_dead_writers_slots_are_free() -> None:
    """Frozen and then killed: its end is the proof that nothing is written any more."""
    with running_daemon() as daemon, running_writer(daemon, NUM_BLOCKS, LEASE_S) as writer:
        writer.hear()
        writer.signal(signal.SIGSTOP)
        wait_until(lambda: daemon.gauge("slots_fenced") == NUM_BLOCKS, "the lease is over")
        writer.kill()

        wait_until(lambda: daemon.gauge("slots_fenced") == 0, "the slots are free")
        assert daemon.gauge("slots_free") == num_slots(daemon)


def test_a_writer_killed_amid_a_copy_leaves_no_block() -> None:
    """Its lease is long, but its process is gone: slots are free at once, and nothing is lent."""
    with running_daemon() as daemon, running_writer(daemon, NUM_BLOCKS, 30.0) as writer:
        writer.hear()
        writer.kill()

        wait_until(lambda: daemon.gauge("slots_free") == num_slots(daemon), "the slots are free")
        with opened_prefixes(daemon) as client:
            assert acquire(client, hashes_of(FIRST, 1)) is None


def test_a_writer_frozen_over_a_restart_stays_fenced_off() -> None:
    """The new daemon finds its slots in the pool, and waits until it greets or dies."""
    with running_daemon() as daemon, running_writer(daemon, NUM_BLOCKS, 30.0) as writer:
        frozen = set(writer.hear()["slots"])
        writer.signal(signal.SIGSTOP)
        daemon.kill()
        daemon.start()
        assert daemon.gauge("slots_fenced") >= NUM_BLOCKS

        with Worker(daemon) as worker, opened_prefixes(daemon) as client:
            num_blocks = num_slots(daemon) + 100
            assert not fill(worker, num_blocks) & frozen
            writer.signal(signal.SIGCONT)
            writer.tell("go on")
            assert "timeout_s" in writer.hear()
            assert daemon.gauge("slots_fenced") == 0
            kept = hashes_of(200, num_blocks - 200)
            assert load_right_or_not_at_all(worker, client, kept) == len(kept)


def test_a_greeting_ends_what_its_own_engine_was_writing() -> None:
    """A worker that greets anew says that its earlier copies are over; their commit is late."""
    with running_daemon() as daemon, Worker(daemon) as before:
        reserved = before.reserve(hashes_of(0, NUM_BLOCKS))
        with Worker(daemon):
            assert before.commit(reserved).is_fenced


def test_a_greeting_does_not_speak_for_another_engine_of_its_process() -> None:
    """Two engines may live in one process; one's greeting says nothing about the other's copies."""
    hashes = hashes_of(0, NUM_BLOCKS)
    with running_daemon() as daemon, Worker(daemon, engine_id="one") as one:
        reserved = one.reserve(hashes)
        with Worker(daemon, engine_id="two") as two:
            one.copy(hashes, split_slots(reserved.slots))
            assert one.commit(reserved).num_ready == NUM_BLOCKS
            with opened_prefixes(daemon) as client:
                assert load_right_or_not_at_all(two, client, hashes) == NUM_BLOCKS
