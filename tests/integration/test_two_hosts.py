"""Two hosts share blocks through a store on a third, to the byte and within the waits announced.

Hosts are network namespaces, with a real daemon on two of them and real servers on the third. A
worker and a scheduler reach their daemon over its Unix socket, as files are shared. What real
engines answer, also when a host or the store dies, is in tests/e2e/test_two_hosts.py.
"""

import contextlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from kvkeep.client.prefixes import PrefixClient
from kvkeep.model.ids import BlockHash
from kvkeep.protocol import messages as m
from tests.integration.daemons import (
    CALL_TIMEOUT_S,
    COMMAND,
    Daemon,
    Worker,
    acquire,
    connect,
    hashes_of,
    opened_prefixes,
    payload_of,
    wait_until,
)
from tests.servers.hosts import Host, three_hosts
from tests.servers.listening import children_of, listening_addresses
from tests.servers.seaweed import KEY, SECRET
from tests.servers.shared_store import KINDS, SharedStore

LOOPBACK = "127.0.0.1"
pytestmark = [pytest.mark.root, pytest.mark.allow_hosts([LOOPBACK, "192.0.2.3"])]

NUM_BLOCKS = 24
ANNOUNCED_S_MAX = 5.0
"""The longest wait that a daemon announces where it is told to load (daemon/movement/pace.py)."""
PATIENCE_S = 15.0
"""Beyond what was announced, on a busy machine; a call that nobody ends takes minutes."""
BACK_TIMEOUT_S = 90.0

_numbers = itertools.count(1)


def fresh() -> list[BlockHash]:
    """Hashes of a sequence that nobody has stored yet."""
    return hashes_of(1000 * next(_numbers), NUM_BLOCKS)


# --- The three hosts ------------------------------------------------------------------------------


class RemoteDaemon(Daemon):
    """A daemon on a host of its own; its metrics port is that host's."""

    def __init__(self, host: Host, tier: dict[str, object]) -> None:
        super().__init__((*host.within, *COMMAND), planner="load")
        config = self.folder / "daemon.yaml"
        config.write_text(json.dumps({"tiers": [tier]}))
        self.settings["config"] = config

    def status(self) -> dict[str, Any]:
        """What it says of itself, over its socket."""
        connection = connect(self)
        try:
            request = m.GetStatus(connection.next_request_id())
            text = connection.call(request, m.Status, CALL_TIMEOUT_S).text
        finally:
            connection.close()
        found: dict[str, Any] = json.loads(text)
        return found

    def end(self) -> None:
        """End it; nothing of it is left."""
        self.kill()
        self.pool.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass
class Site:
    """What a test may break, and has to mend."""

    hosts: tuple[Host, Host]
    daemons: tuple[RemoteDaemon, RemoteDaemon]


@pytest.fixture(params=KINDS)
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """Two hosts with a daemon each, and a store, all at work."""
    with (
        pytest.MonkeyPatch.context() as environment,
        contextlib.ExitStack() as ends,
    ):
        environment.setenv("AWS_ACCESS_KEY_ID", KEY)
        environment.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        one, other, third = ends.enter_context(three_hosts())
        store = SharedStore(request.param, third)
        ends.callback(store.end)
        store.start()
        daemons = (
            RemoteDaemon(one, store.tier(one)),
            RemoteDaemon(other, store.tier(other)),
        )
        for daemon in daemons:
            ends.callback(daemon.end)
            daemon.start()
        yield Site((one, other), daemons)


# --- What their engines do ------------------------------------------------------------------------


@dataclass
class Engine:
    """A worker and a scheduler of one host."""

    daemon: RemoteDaemon
    worker: Worker
    client: PrefixClient

    def store(self, hashes: list[BlockHash]) -> None:
        """Store a sequence."""
        assert self.worker.store(hashes) == len(hashes)

    def serve(self, hashes: list[BlockHash]) -> int:
        """Load what a sequence's answer lends; returns how many blocks, each with its bytes.

        The answer comes within the wait that was announced, or the daemon would count as lost.
        """
        begun_s = time.perf_counter()
        lease = acquire(self.client, hashes)
        assert time.perf_counter() - begun_s < ANNOUNCED_S_MAX + PATIENCE_S
        assert self.client.num_late == 0
        if lease is None:
            return 0
        landed, found = self.worker.load(hashes[: len(lease.slots)], lease.slots)
        self.client.release([lease], num_loaded=sum(landed), load_us=1000)
        for block_hash, block, is_there in zip(hashes, found, landed, strict=False):
            assert is_there
            assert np.array_equal(block, payload_of(block_hash))
        return len(lease.slots)


@contextlib.contextmanager
def engine_of(daemon: RemoteDaemon) -> Iterator[Engine]:
    """An engine that is attached, with its daemon's tier open."""
    with Worker(daemon) as worker, opened_prefixes(daemon, patience_s=PATIENCE_S) as client:
        wait_until(lambda: daemon.status()["movement"]["is_open"], "tiers open")
        yield Engine(daemon, worker, client)


@contextlib.contextmanager
def engines_of(site: Site) -> Iterator[tuple[Engine, Engine]]:
    """An engine on each host."""
    with engine_of(site.daemons[0]) as one, engine_of(site.daemons[1]) as other:
        yield one, other


def reaches(source: Engine, target: Engine) -> Callable[[], bool]:
    """A question whether what one engine stores, the other is served."""

    def ask() -> bool:
        hashes = fresh()
        before = source.daemon.counter("blocks_cascaded")
        source.store(hashes)
        with contextlib.suppress(AssertionError):
            kept = before + NUM_BLOCKS
            wait_until(lambda: source.daemon.counter("blocks_cascaded") >= kept, "cascaded", 2.0)
            promoted = target.daemon.counter("blocks_promoted")
            is_served = target.serve(hashes) == NUM_BLOCKS
            return is_served and target.daemon.counter("blocks_promoted") == promoted + NUM_BLOCKS
        return False

    return ask


def all_is_well(one: Engine, other: Engine) -> None:
    """Wait until each host is served what the other stores."""
    wait_until(reaches(one, other), "the first host's blocks at the second", BACK_TIMEOUT_S)
    wait_until(reaches(other, one), "the second host's blocks at the first", BACK_TIMEOUT_S)


# --- The test -------------------------------------------------------------------------------------


def test_hosts_share_and_lose_nothing_when_one_is_cut_off(site: Site) -> None:
    """Each is served what the other stored; its own in time with its cable out; then all again.

    Meanwhile each listens on its own address alone.
    """
    shared, own = fresh(), fresh()
    with engines_of(site) as (one, other):
        all_is_well(one, other)
        for host, daemon in zip(site.hosts, site.daemons, strict=True):
            pids = [daemon.pid, *children_of(daemon.pid)]
            found = {address for pid in pids for address in listening_addresses(pid)}
            assert found <= {LOOPBACK, host.address}  # what was said, and for its metrics
        one.store(shared)
        site.hosts[0].cut()
        try:
            one.store(own)
            assert one.serve(own) == NUM_BLOCKS
            for _ in range(3):
                other.serve(shared)
                one.serve(fresh())
        finally:
            site.hosts[0].join()
        all_is_well(one, other)
