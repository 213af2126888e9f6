"""What lies below a daemon's pool in tests, each with the ways in which it breaks."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kvkeep.client.prefixes import Answer, PrefixClient
from kvkeep.model.ids import BlockHash
from kvkeep.protocol import messages as m
from kvkeep.testing.tcp_proxy import FaultyRelay
from tests.integration.daemons import (
    CALL_TIMEOUT_S,
    COMMAND,
    NAMESPACE,
    Daemon,
    Worker,
    connect,
    opened_prefixes,
    payload_of,
    running_daemon,
    wait_until,
)
from tests.servers.mooncake import CLIENT_TTL_S, SHORT_TTL_S, MooncakeStore, mooncake_store
from tests.servers.processes import ServerProcess
from tests.servers.seaweed import KEY, SECRET, SeaweedServer
from tests.servers.valkey import ValkeyServer
from tests.waiting import HANG_S

TIMEOUT_S = 1.0
"""Of a tier for one call, where one that hangs is to be given up."""
PATIENT = "patient "
"""Before a kind: a medium of which no call is given up, for a busy machine is no fault."""
PATIENCE_S = 3.0
"""Beyond what was announced, on a busy machine; far from hung."""
CONFIG = "daemon.yaml"
"""Name of a daemon's settings file."""
QUESTIONS = 4
"""Asked of a broken medium: the first is answered late, the last not any more."""
BACK_TIMEOUT_S = 90.0
"""A tier is tried again every two seconds; a store that lost a member takes longest."""


class Medium:
    """A medium with a server; a disk has none."""

    def __init__(
        self,
        tier: dict[str, object],
        server: ServerProcess | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        limits: dict[str, object] = {"deadline_s": 1.5 * timeout_s}
        if tier["kind"] != "disk":
            limits["timeout_s"] = timeout_s
        self.tier = tier | limits
        self.server = server
        self.relay: FaultyRelay | None = None

    def restart(self) -> None:
        """Start the server again, empty."""
        assert isinstance(self.server, ValkeyServer)
        self.server.run()


class S3Medium(Medium):
    """An object store."""

    def restart(self) -> None:
        """Start the server again, empty."""
        assert isinstance(self.server, SeaweedServer)
        self.server.clear()
        self.server.run()


class MooncakeMedium(Medium):
    """A Mooncake Store of which one process breaks that holds values."""

    def __init__(self, store: MooncakeStore, timeout_s: float) -> None:
        tier: dict[str, object] = {"kind": "mooncake", "master": store.address}
        super().__init__(tier, store.storages[0], timeout_s)
        self._store = store

    def restart(self) -> None:
        """Start another process that holds values, in place of the lost one."""
        self._store.start_storage()


@contextlib.contextmanager
def opened_medium(kind: str, folder: Path) -> Iterator[Medium]:
    """A medium with its server; nothing of it is left."""
    timeout_s = HANG_S if kind.startswith(PATIENT) else TIMEOUT_S
    kind = kind.removeprefix(PATIENT)
    with contextlib.ExitStack() as stack:
        if kind == "disk":
            folder /= "disk"
            disk: dict[str, object] = {
                "kind": "disk",
                "folder": str(folder),
                "capacity_bytes": "64MiB",
            }
            yield Medium(disk, timeout_s=timeout_s)
        elif kind == "mooncake":
            ttl_s = SHORT_TTL_S if timeout_s == TIMEOUT_S else CLIENT_TTL_S
            store = stack.enter_context(mooncake_store(client_ttl_s=ttl_s))
            yield MooncakeMedium(store, timeout_s)
        else:
            yield _relayed(kind, stack, timeout_s)


def _relayed(kind: str, stack: contextlib.ExitStack, timeout_s: float) -> Medium:
    """A medium behind a network that breaks."""
    server: ValkeyServer | SeaweedServer
    server = (ValkeyServer() if kind == "valkey" else SeaweedServer()).run()
    stack.callback(server.stop)
    relay = stack.enter_context(FaultyRelay(("127.0.0.1", server.port), seed=7))
    tier: dict[str, object] = {"kind": kind}
    if kind == "valkey":
        tier |= {"url": f"valkey://127.0.0.1:{relay.address[1]}"}
        medium = Medium(tier, server, timeout_s)
    else:
        assert isinstance(server, SeaweedServer)
        endpoint = f"http://127.0.0.1:{relay.address[1]}"
        tier |= {"url": server.settings().url, "endpoint": endpoint}
        medium = S3Medium(tier, server, timeout_s)
    medium.relay = relay
    return medium


S3_ENVIRONMENT = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}


class Site:
    """A daemon above one medium, a worker that stores and a scheduler that asks."""

    def __init__(self, daemon: Daemon, worker: Worker, client: PrefixClient) -> None:
        self.daemon = daemon
        self.worker = worker
        self.client = client

    def cascade(self, hashes: Sequence[BlockHash]) -> None:
        """Store blocks and wait until nothing is on its way down."""
        self.worker.store(hashes)
        self.settle()

    def settle(self) -> None:
        """Wait until nothing moves: no lease runs but the canary's, no slot is being filled."""

        def is_quiet() -> bool:
            status = self.daemon.status()
            gauges, waiting = status["gauges"], status["movement"]["cascades_waiting"]
            # Clearing puts the canary's slot behind a fence, as its writer may still write.
            num_written = gauges["slots_writing"] + gauges["slots_fenced"]
            found = (gauges["read_leases"], gauges["write_leases"], num_written)
            return not waiting and found == (0, 1, 1) and not gauges["slots_doomed"]

        wait_until(is_quiet, "nothing moves", BACK_TIMEOUT_S)

    def clear_pool(self) -> None:
        """Forget every block of the pool; the tiers keep theirs."""
        with contextlib.closing(connect(self.daemon)) as tool:
            tool.call(m.Clear(tool.next_request_id()), m.Cleared, CALL_TIMEOUT_S)

    def serve(self, hashes: Sequence[BlockHash]) -> int:
        """Ask for a prefix and load it; returns how many blocks landed, each with its bytes."""
        question = self.client.ask(NAMESPACE, 0, hashes)
        assert question is not None
        lease = self.client.answer(question, CALL_TIMEOUT_S)
        assert self.client.num_late == 0, "the daemon broke its word"
        assert self.client.is_connected
        if isinstance(lease, Answer):
            return 0
        landed, found = self.worker.load(hashes[: len(lease.slots)], lease.slots)
        self.client.release([lease], num_loaded=sum(landed))
        for block_hash, block, is_there in zip(hashes, found, landed, strict=False):
            assert not is_there or np.array_equal(block, payload_of(block_hash))
        return sum(landed)

    def ask_while_broken(self, hashes: Sequence[BlockHash], others: Sequence[BlockHash]) -> None:
        """What the medium can't give is computed; the pool goes on serving what it has."""
        self.clear_pool()
        for _ in range(QUESTIONS):
            self.serve(hashes)
        self.worker.store(others)
        assert self.serve(others) == len(others)

    def is_served_from_below(self, hashes: Sequence[BlockHash]) -> bool:
        """Whether the medium has all of a prefix; what is missing is stored again."""
        self.settle()
        self.clear_pool()
        if self.serve(hashes) == len(hashes):
            return True
        self.worker.store(hashes)
        return False

    def wait_for_service(self, hashes: Sequence[BlockHash]) -> None:
        """Wait until the medium serves all of a prefix again, and nothing is left behind."""
        wait_until(lambda: self.is_served_from_below(hashes), "served again", BACK_TIMEOUT_S)
        self.settle()


def write_config(folder: Path, tiers: Sequence[dict[str, object]]) -> Path:
    """A daemon's settings file with these tiers."""
    config = folder / CONFIG
    config.write_text(json.dumps({"tiers": list(tiers), "planner": "load"}))
    return config


@contextlib.contextmanager
def running_site(medium: Medium, folder: Path, command: Sequence[str] = COMMAND) -> Iterator[Site]:
    """A daemon above this medium, whose tier is open."""
    config = write_config(folder, [medium.tier])
    with running_daemon(command, config=config) as daemon, attached(daemon) as site:
        yield site


@contextlib.contextmanager
def attached(daemon: Daemon) -> Iterator[Site]:
    """A worker and a scheduler of a daemon."""
    with Worker(daemon) as worker, opened_prefixes(daemon, patience_s=PATIENCE_S) as client:
        wait_until(lambda: daemon.status()["movement"]["is_open"], "tiers open", BACK_TIMEOUT_S)
        site = Site(daemon, worker, client)
        try:
            yield site
        finally:
            # A fixture's value outlives the test: the pool's file is closed with its last view.
            site.__dict__.clear()
