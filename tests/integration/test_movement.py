"""A real daemon with a disk below its pool: what the pool can't hold comes back from there."""

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvkeep.client.prefixes import PrefixClient
from kvkeep.daemon.movement.proving import BATCH as CANARIES
from kvkeep.model.ids import BlockHash
from kvkeep.protocol import messages as m
from kvkeep.protocol.codec import join_hashes, split_slots
from tests.integration.daemons import (
    CALL_TIMEOUT_S,
    NAMESPACE,
    Daemon,
    Worker,
    acquire,
    connect,
    hashes_of,
    opened_prefixes,
    payload_of,
    running_daemon,
    wait_until,
)
from tests.servers.seaweed import KEY, SECRET, SeaweedServer
from tests.servers.valkey import ValkeyServer
from tests.waiting import HANG_S

NUM_SEQUENCES = 80
SEQUENCE_BLOCKS = 250
"""Together ten times what the pool holds."""


PREFILL_TOKENS_S = 200
"""Of an engine that is worth loading for."""


def disk_in(folder: Path) -> dict[str, object]:
    """A disk tier as a settings file says it; one that is busy is not left alone."""
    where = {"folder": str(folder), "capacity_bytes": "1GiB"}
    return {"kind": "disk", "deadline_s": HANG_S, **where}


@contextlib.contextmanager
def daemon_with(folder: Path, *tiers: object, planner: str = "auto") -> Iterator[Daemon]:
    """A daemon with these tiers below its pool."""
    folder.mkdir(exist_ok=True)
    config = folder / "daemon.yaml"
    config.write_text(json.dumps({"tiers": tiers}))
    with running_daemon(config=config, planner=planner) as daemon:
        yield daemon


@contextlib.contextmanager
def daemon_with_disk(folder: Path, planner: str = "auto") -> Iterator[Daemon]:
    """A daemon that keeps blocks in this folder as well."""
    with daemon_with(folder, disk_in(folder / "disk"), planner=planner) as daemon:
        yield daemon


def wait_for_tiers(daemon: Daemon) -> None:
    """Tiers are opened once the first worker has told how long a block is."""
    wait_until(lambda: daemon.status()["movement"]["is_open"], "tiers open")


def store_sequence(daemon: Daemon, worker: Worker, hashes: list[BlockHash]) -> None:
    """Store one sequence and wait until the tier has it, as slow traffic would."""
    wait_for_tiers(daemon)
    before = daemon.counter("blocks_cascaded")
    worker.store(hashes)
    wait_until(lambda: daemon.counter("blocks_cascaded") >= before + len(hashes), "blocks cascaded")


def serve(worker: Worker, client: PrefixClient, hashes: list[BlockHash]) -> int:
    """Acquire and load a sequence; returns how many blocks landed, each with its bytes."""
    lease = acquire(client, hashes)
    if lease is None:
        return 0
    landed, found = worker.load(hashes[: len(lease.slots)], lease.slots)
    client.release([lease], num_loaded=sum(landed), load_us=1000)
    for block_hash, block, is_there in zip(hashes, found, landed, strict=False):
        assert not is_there or np.array_equal(block, payload_of(block_hash))
    return sum(landed)


def replay(worker: Worker, client: PrefixClient, sequences: list[list[BlockHash]]) -> None:
    """Acquire and load each sequence whole; again where blocks came too late to wait for them."""
    for hashes in sequences:
        wait_until(lambda: serve(worker, client, hashes) == len(hashes), "served whole")  # noqa: B023


def num_values(server: ValkeyServer) -> int:
    """How many values a server has."""
    return int(server.command("DBSIZE").strip()[1:])


def clear_pool(daemon: Daemon) -> None:
    """Have every block of the pool forgotten."""
    with contextlib.closing(connect(daemon)) as tool:
        tool.call(m.Clear(tool.next_request_id()), m.Cleared, CALL_TIMEOUT_S)


def test_a_replay_of_ten_times_the_pool_is_served(tmp_path: Path) -> None:
    """From the disk, and again after everything was killed and the pool is gone."""
    sequences = [hashes_of(1000 * n, SEQUENCE_BLOCKS) for n in range(NUM_SEQUENCES)]
    with daemon_with_disk(tmp_path, planner="load") as daemon:
        with Worker(daemon) as worker, opened_prefixes(daemon) as client:
            for hashes in sequences:
                store_sequence(daemon, worker, hashes)
            assert daemon.gauge("slots") * 10 <= NUM_SEQUENCES * SEQUENCE_BLOCKS
            replay(worker, client, sequences)
            assert daemon.counter("blocks_promoted") > 0.8 * NUM_SEQUENCES * SEQUENCE_BLOCKS
        daemon.kill()
        daemon.pool.unlink()
    with (
        daemon_with_disk(tmp_path, planner="load") as daemon,
        Worker(daemon) as worker,
        opened_prefixes(daemon) as client,
    ):
        wait_for_tiers(daemon)
        replay(worker, client, sequences)
        wait_until(lambda: daemon.gauge("read_leases") == 0, "leases given back")
        assert daemon.gauge("write_leases") == 1  # the canary's


def test_the_same_blocks_are_read_once_for_all_who_wait(tmp_path: Path) -> None:
    """Eight requests for one prefix are one transfer."""
    hashes = hashes_of(0, 200)
    others = [hashes_of(1000 * n, SEQUENCE_BLOCKS) for n in range(1, 12)]
    with daemon_with_disk(tmp_path, planner="load") as daemon, Worker(daemon) as worker:
        for sequence in [hashes, *others]:
            store_sequence(daemon, worker, sequence)
        with opened_prefixes(daemon) as client:
            questions = [client.ask(b"n" * 32, 0, hashes) for _ in range(8)]  # type: ignore[arg-type]
            for question in questions:
                assert question is not None
                lease = client.answer(question, CALL_TIMEOUT_S)
                assert len(lease.slots) == 200  # type: ignore[union-attr]
        assert daemon.counter("blocks_promoted") == 200


def test_a_miss_is_not_waited_for(tmp_path: Path) -> None:
    """What no tier has is answered at once, and so is what the pool has."""
    with daemon_with_disk(tmp_path) as daemon, Worker(daemon) as worker:
        store_sequence(daemon, worker, hashes_of(0, 10))
        with opened_prefixes(daemon, patience_s=5.0) as client:
            assert acquire(client, hashes_of(50, 10)) is None
            lease = acquire(client, hashes_of(0, 20))
            assert lease is not None
            assert len(lease.slots) == 10
        assert daemon.counter("blocks_promoted") == 0


def test_a_question_that_waits_is_one_question(tmp_path: Path) -> None:
    """Half of its blocks are in the pool and half come: all counters see it once."""
    hashes = hashes_of(0, 40)
    with daemon_with_disk(tmp_path, planner="load") as daemon, Worker(daemon) as worker:
        store_sequence(daemon, worker, hashes)
        clear_pool(daemon)
        with opened_prefixes(daemon) as client:
            lease = acquire(client, hashes[:20])
            assert lease is not None
            client.release([lease])
            names = ("lookups", "lookup_blocks", "blocks_lent", "blocks_promoted")
            before = [daemon.counter(name) for name in names]
            lease = acquire(client, hashes)
            assert lease is not None
            after = [daemon.counter(name) for name in names]
            assert daemon.gauge("read_leases") == 1
            client.release([lease])
        assert [n - o for n, o in zip(after, before, strict=True)] == [1, 40, 40, 20]
        wait_until(lambda: daemon.gauge("read_leases") == 0, "leases given back")


def test_two_tiers_of_a_kind_are_told_apart(tmp_path: Path) -> None:
    """In the status, in measured speeds, and by whoever clears one of them."""
    hashes = hashes_of(0, 40)
    disks = [disk_in(tmp_path / "one"), disk_in(tmp_path / "other")]
    with daemon_with(tmp_path, *disks) as daemon, Worker(daemon) as worker:
        wait_for_tiers(daemon)
        worker.store(hashes)
        wait_until(lambda: daemon.counter("blocks_cascaded") == 80, "blocks in both")
        with contextlib.closing(connect(daemon)) as tool:
            request = m.ClearTiers(tool.next_request_id(), ["disk-2"])
            told = tool.call(request, m.Told, CALL_TIMEOUT_S)
        movement = daemon.status()["movement"]

    assert json.loads(told.text)["num_cleared"] == 40
    held = {tier["name"]: tier["num_values"] for tier in movement["tiers"]}
    assert held == {"disk": 40, "disk-2": 0}
    assert {"disk", "disk-2"} <= movement["bytes_per_s"].keys()


def test_a_restart_writes_nothing_that_a_server_has(tmp_path: Path) -> None:
    """Of blocks in the pool and in the store, none is written again; it is asked for them."""
    hashes = hashes_of(0, 200)
    server = ValkeyServer().run()
    try:
        valkey = {"kind": "valkey", "url": server.url}
        with daemon_with(tmp_path, valkey) as daemon:
            with Worker(daemon) as worker:
                store_sequence(daemon, worker, hashes)
            assert daemon.stop() == 0
            daemon.start()
            wait_for_tiers(daemon)
            with Worker(daemon) as worker:
                store_sequence(daemon, worker, hashes_of(1000, 10))
            (tier,) = daemon.status()["movement"]["tiers"]

            assert tier["writes"]["num_keys"] == CANARIES + 10
            assert daemon.counter("blocks_recovered") == 200
    finally:
        server.stop()


def test_a_server_that_was_started_again_empty_gets_the_pool_again(tmp_path: Path) -> None:
    """Nobody asked it for anything meanwhile: what was believed of it is found out and given up."""
    hashes = hashes_of(0, 40)
    server = ValkeyServer().run()
    try:
        valkey = {"kind": "valkey", "url": server.url}
        with (
            daemon_with(tmp_path, valkey, planner="load") as daemon,
            Worker(daemon) as worker,
            opened_prefixes(daemon) as client,
        ):
            store_sequence(daemon, worker, hashes)
            server.kill()
            server.run()
            assert num_values(server) == 0
            wait_until(lambda: num_values(server) == len(hashes), "filled again")

            clear_pool(daemon)
            wait_until(lambda: serve(worker, client, hashes) == len(hashes), "served by it")
    finally:
        server.stop()


def announced_wait_us(daemon: Daemon, hashes: list[BlockHash]) -> int:
    """Ask for a prefix that the pool has not, and leave; returns the wait that was announced."""
    clear_pool(daemon)
    with contextlib.closing(connect(daemon)) as tool:
        question = m.Acquire(
            tool.next_request_id(), NAMESPACE, 0, join_hashes(hashes), 30.0, PREFILL_TOKENS_S
        )
        return tool.call(question, m.Acquired, CALL_TIMEOUT_S).wait_us


@pytest.mark.parametrize("planner", ["auto", "load"])
def test_a_server_that_stands_still_is_waited_for_by_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planner: str
) -> None:
    """Long before the deadline of a call nobody waits any more; it is asked when it is back."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    hashes = hashes_of(0, 40)
    server = SeaweedServer().run()
    try:
        store = {
            "kind": "object_store",
            "url": server.settings().url,
            "endpoint": server.endpoint,
            "timeout_s": 60,
            "deadline_s": 60,
        }
        with daemon_with(tmp_path, store, planner=planner) as daemon, Worker(daemon) as worker:
            store_sequence(daemon, worker, hashes)
            wait_until(lambda: announced_wait_us(daemon, hashes) > 0, "asked for")
            server.freeze()
            wait_until(lambda: not announced_wait_us(daemon, hashes), "nobody waits")
            assert daemon.status()["movement"]["tiers"][0]["breaker"] == "closed"
            assert not announced_wait_us(daemon, hashes)
            server.thaw()

            wait_until(lambda: announced_wait_us(daemon, hashes) > 0, "asked again")
    finally:
        server.stop()


@contextlib.contextmanager
def deaf_server() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield listener.getsockname()[1]


def hanging_tier(kind: str, port: int) -> dict[str, object]:
    """A tier whose server is deaf, and whose calls take ten minutes to give that up."""
    patience = {"kind": kind, "timeout_s": 600, "deadline_s": 600}
    match kind:
        case "valkey":
            return patience | {"url": f"valkey://127.0.0.1:{port}"}
        case "object_store":
            return patience | {"url": "s3://kv1", "endpoint": f"http://127.0.0.1:{port}"}
        case _:
            return patience | {"master": f"127.0.0.1:{port}"}


@pytest.mark.parametrize("kind", ["valkey", "object_store", "mooncake"])
def test_a_tier_that_hangs_while_it_opens_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The tier after it serves, the daemon ends when it is told to, and so does one that starts."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    hashes = hashes_of(0, 40)
    with deaf_server() as port:
        tiers = [hanging_tier(kind, port), disk_in(tmp_path / "disk")]
        with daemon_with(tmp_path, *tiers, planner="load") as daemon:
            with Worker(daemon) as worker, opened_prefixes(daemon) as client:

                def open_tiers() -> list[str]:
                    return [tier["name"] for tier in daemon.status()["movement"]["tiers"]]

                wait_until(lambda: "disk" in open_tiers(), "the disk is open")
                worker.store(hashes)
                wait_until(lambda: daemon.counter("blocks_cascaded") == 40, "blocks on the disk")
                assert serve(worker, client, hashes) == 40
            assert daemon.stop() == 0
            daemon.start()
            assert daemon.stop() == 0


def test_what_was_prefetched_is_lent_at_once(tmp_path: Path) -> None:
    """An Acquire after a prefetch finds its blocks in the pool: its first answer is the lease."""
    hashes = hashes_of(0, 40)
    with daemon_with_disk(tmp_path, planner="load") as daemon, Worker(daemon) as worker:
        store_sequence(daemon, worker, hashes)
        with contextlib.closing(connect(daemon)) as tool, opened_prefixes(daemon) as client:
            tool.call(m.Clear(tool.next_request_id()), m.Cleared, CALL_TIMEOUT_S)
            assert client.prefetch(NAMESPACE, 0, hashes)
            wait_until(lambda: daemon.counter("prefetches_brought") == 1, "blocks brought")
            number = tool.next_request_id()
            request = m.Acquire(number, NAMESPACE, 0, join_hashes(hashes), 30.0)
            answer = tool.call(request, m.Acquired, CALL_TIMEOUT_S)

            assert answer.wait_us == 0
            assert len(split_slots(answer.slots)) == 40
            tool.send(m.Release([answer.lease_id]))
            assert acquire(client, hashes_of(900, 4)) is None
            assert client.num_prefetching == 40
        counters = daemon.status()["counters"]
        assert counters["blocks_promoted"] == 40
        assert (counters["prefetches_asked"], counters["prefetches_refused"]) == (1, 0)
        assert counters["promotions_late"] == 0
