"""What is left after the daemon died: every committed block, and nothing else."""

import os
import signal
import threading

import numpy as np
import pytest

from kvkeep.model.errors import UnavailableError
from kvkeep.model.ids import BlockHash
from kvkeep.protocol.codec import split_slots
from tests.integration.daemons import (
    LAYOUT,
    Daemon,
    Vandal,
    Worker,
    acquire,
    hash_of,
    hashes_of,
    load_right_or_not_at_all,
    opened_prefixes,
    running_daemon,
    wait_until,
)

NUM_BLOCKS = 1000


def test_committed_blocks_survive_a_killed_daemon() -> None:
    """At least 99 of 100 are readable and have their bytes; in fact all."""
    hashes = hashes_of(0, NUM_BLOCKS)
    with running_daemon() as daemon:
        with Worker(daemon) as worker:
            assert worker.store(hashes) == NUM_BLOCKS
            daemon.kill()
        daemon.start()

        assert daemon.counter("blocks_recovered") == NUM_BLOCKS
        assert daemon.counter("blocks_dropped") == 0
        with Worker(daemon) as worker, opened_prefixes(daemon) as client:
            lease = acquire(client, hashes)
            assert lease is not None
            assert len(lease.slots) == NUM_BLOCKS
            assert load_right_or_not_at_all(worker, client, hashes) == NUM_BLOCKS


def test_a_daemon_killed_amid_stores_loses_only_what_was_in_flight() -> None:
    """Again and again killed while it is stored to: what was acknowledged is there, and right."""
    with running_daemon() as daemon:
        acknowledged = 0
        for _ in range(3):
            with Worker(daemon) as worker:
                killer = threading.Timer(0.1, daemon.signal, [signal.SIGKILL])
                killer.start()
                acknowledged += _store_until_killed(worker, acknowledged)
                killer.join()
            daemon.kill()
            daemon.start()
            assert daemon.counter("blocks_dropped") == 0

        assert acknowledged > 0
        with Worker(daemon) as worker, opened_prefixes(daemon) as client:
            found = load_right_or_not_at_all(worker, client, hashes_of(0, acknowledged))
            assert found >= 0.99 * acknowledged


def _store_until_killed(worker: Worker, first: int) -> int:
    """Store small batches until nobody answers; returns the blocks that were acknowledged."""
    num_stored = 0
    try:
        while first + num_stored < NUM_BLOCKS:
            num_stored += worker.store(hashes_of(first + num_stored, 4))
    except UnavailableError:
        pass
    return num_stored


def test_a_torn_and_a_rotten_block_are_dropped() -> None:
    """A block whose copy was cut short, and one whose bytes rotted, are never lent."""
    hashes = hashes_of(0, 100)
    with running_daemon() as daemon:
        with Worker(daemon) as worker:
            worker.store(hashes)
            slots = _slots(daemon, hashes[:3])
            vandal = Vandal(worker.view)
            vandal.payload(slots[0])[LAYOUT.block_bytes // 2 :] = 0
            vandal.flip(vandal.payload(slots[1]), 12345)
            vandal.flip(vandal.header(slots[2]), 321)
            daemon.kill()
        daemon.start()

        assert daemon.counter("blocks_dropped") == 3
        assert daemon.counter("blocks_recovered") == 97
        with Worker(daemon) as worker, opened_prefixes(daemon) as client:
            assert all(acquire(client, [block_hash]) is None for block_hash in hashes[:3])
            assert load_right_or_not_at_all(worker, client, hashes) == 97
            assert worker.store(hashes) == 3
            assert load_right_or_not_at_all(worker, client, hashes) == 100


def _slots(daemon: Daemon, hashes: list[BlockHash]) -> list[int]:
    """In which slots blocks lie."""
    slots = []
    with opened_prefixes(daemon) as client:
        for block_hash in hashes:
            lease = acquire(client, [block_hash])
            assert lease is not None
            slots.append(lease.slots[0])
    return slots


def test_rot_that_a_start_did_not_look_for_is_found_by_the_reader() -> None:
    """A daemon told not to verify takes every readable header over; a load still finds out."""
    hashes = hashes_of(0, 10)
    with running_daemon(verify_on_start=False) as daemon:
        with Worker(daemon) as worker:
            worker.store(hashes)
            vandal = Vandal(worker.view)
            vandal.flip(vandal.payload(_slots(daemon, hashes[:1])[0]), 99)
            daemon.kill()
        daemon.start()

        assert daemon.counter("blocks_recovered") == 10
        with Worker(daemon) as worker, opened_prefixes(daemon) as client:
            assert load_right_or_not_at_all(worker, client, hashes) == 9


def test_a_slot_written_by_a_living_process_waits_for_it() -> None:
    """After a crash a slot stays behind its fence until its writer greets the new daemon."""
    with running_daemon() as daemon:
        with Worker(daemon) as worker:
            reserved = worker.reserve(hashes_of(0, 5))
            assert len(split_slots(reserved.slots)) == 5
            daemon.kill()
        daemon.start()
        assert daemon.gauge("slots_fenced") >= 5

        with Worker(daemon):
            assert daemon.gauge("slots_fenced") == 0


def test_a_pool_that_was_cut_starts_empty() -> None:
    """A truncated file is no pool to trust: it is replaced, and the daemon serves."""
    with running_daemon() as daemon:
        with Worker(daemon) as worker:
            worker.store(hashes_of(0, 10))
        daemon.kill()
        os.truncate(daemon.pool, daemon.pool.stat().st_size // 2)
        daemon.start()

        assert daemon.counter("blocks_recovered") == 0
        with Worker(daemon) as worker, opened_prefixes(daemon) as client:
            assert worker.store(hashes_of(0, 10)) == 10
            assert load_right_or_not_at_all(worker, client, hashes_of(0, 10)) == 10


@pytest.mark.parametrize("offset", [0, 20, 45, 100])
def test_a_rotten_first_page_starts_empty(offset: int) -> None:
    """Magic, name, generation and layout have a check; a pool that fails it is not guessed at."""
    with running_daemon() as daemon:
        with Worker(daemon) as worker:
            worker.store(hashes_of(0, 10))
        daemon.kill()
        page = np.memmap(daemon.pool, dtype=np.uint8, mode="r+", shape=(4096,))
        page[offset + 16 if offset else 15] ^= 4
        page._mmap.close()  # type: ignore[attr-defined]
        daemon.start()

        assert daemon.counter("blocks_recovered") == 0
        with Worker(daemon) as worker:
            assert worker.store([hash_of(1)]) == 1


def test_a_reader_keeps_its_mapping_over_a_restart() -> None:
    """A worker that mapped the pool before the crash reads on from the same memory."""
    with running_daemon() as daemon:
        with Worker(daemon) as before:
            before.store(hashes_of(0, 10))
            daemon.kill()
            daemon.start()
            with Worker(daemon) as after, opened_prefixes(daemon) as client:
                assert after.view.pool_id == before.view.pool_id
                assert after.generation == before.generation + 1
                assert load_right_or_not_at_all(before, client, hashes_of(0, 10)) == 10
        wait_until(lambda: daemon.gauge("read_leases") == 0, "leases are given back")
