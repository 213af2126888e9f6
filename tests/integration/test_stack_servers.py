"""Servers that a stack starts for its daemon's tiers: real programs, engines that only pretend."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import msgspec
import pytest

from kvkeep.model.errors import UnavailableError
from kvkeep.stack.readiness import make_client
from kvkeep.stack.record import clear_recorded, read_record
from kvkeep.stack.spec import StackSpec
from kvkeep.stack.supervisor import Stack
from tests.integration.daemons import (
    Daemon,
    Worker,
    hashes_of,
    load_right_or_not_at_all,
    opened_prefixes,
    wait_until,
)
from tests.integration.test_stack import fake_stack, spec_of
from tests.waiting import HANG_S

NUM_BLOCKS = 24
TIERS: dict[str, dict[str, object]] = {
    "valkey": {"kind": "valkey", "start": True, "capacity_bytes": "64MiB"},
    "object_store": {"kind": "object_store", "start": True, "capacity_bytes": "1GiB"},
    "mooncake": {"kind": "mooncake", "start": True, "segment_bytes": "64MiB"},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model as far as a stack looks at it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def with_tier(tmp_path: Path, model: Path, tier: dict[str, object]) -> StackSpec:
    """A stack whose daemon has this tier, and loads whatever it finds."""
    daemon = {"pool_bytes": "16MiB", "tiers": [tier], "settings": {"planner": "load"}}
    engines = [{"name": "a", "kv_cache_bytes": "1MiB"}]
    return spec_of(tmp_path, model, {"daemon": daemon, "engines": engines})


def status(stack: Stack) -> dict[str, Any]:
    """``GET /status`` of a stack's daemon."""
    with make_client(stack.daemon.metrics_url) as client:
        found: dict[str, Any] = client.get(f"{stack.daemon.metrics_url}/status").json()
        return found


@contextmanager
def opened_worker(stack: Stack) -> Iterator[Worker]:
    """A worker, with the daemon's tiers open."""
    with Worker(cast(Daemon, stack.daemon)) as worker:
        wait_until(lambda: status(stack)["movement"]["is_open"], "tiers open")
        yield worker


def store(stack: Stack, worker: Worker, first: int = 0) -> None:
    """Store blocks, and use them until the tier, which may come up late, has them."""
    hashes = hashes_of(first, NUM_BLOCKS)
    goal = num_cascaded(stack) + NUM_BLOCKS
    worker.store(hashes)
    with opened_prefixes(cast(Daemon, stack.daemon), patience_s=5.0) as client:

        def is_kept() -> bool:
            assert load_right_or_not_at_all(worker, client, hashes) == NUM_BLOCKS
            return num_cascaded(stack) >= goal

        wait_until(is_kept, "cascaded")


def num_cascaded(stack: Stack) -> int:
    """Blocks that were written to the tier."""
    return int(status(stack)["counters"]["blocks_cascaded"])


def is_served_from_tier(stack: Stack, worker: Worker) -> bool:
    """Load blocks that the pool has not got until all have come, each with its bytes.

    A tier that is still busy with writing is a miss at first.
    """
    hashes = hashes_of(0, NUM_BLOCKS)
    before = int(status(stack)["counters"]["blocks_promoted"])
    with opened_prefixes(cast(Daemon, stack.daemon), patience_s=5.0) as client:
        wait_until(lambda: load_right_or_not_at_all(worker, client, hashes) == NUM_BLOCKS, "served")
    return int(status(stack)["counters"]["blocks_promoted"]) >= before + NUM_BLOCKS


@pytest.mark.parametrize("kind", TIERS)
def test_a_started_server_keeps_what_the_pool_can_not(
    tmp_path: Path, model: Path, kind: str
) -> None:
    """Blocks that the pool evicted come back from it; down, nothing of it runs or is told."""
    with fake_stack(with_tier(tmp_path, model, TIERS[kind])) as stack:
        with opened_worker(stack) as worker:
            store(stack, worker)
            worker.store(hashes_of(1000, 3 * int(status(stack)["gauges"]["slots"])))

            assert is_served_from_tier(stack, worker)
        record = read_record(stack.folder)
        assert record is not None
        assert f"server of tier {kind}" in [entry.name for entry in record.processes]
        assert {Path(path).stat().st_mode & 0o077 for path in record.sockets} <= {0}
    assert not any(map(os.path.lexists, record.sockets))
    assert not any(entry.process.is_alive() for entry in record.processes)
    assert not list(stack.folder.glob("servers/*/*.json"))
    assert not list(stack.folder.glob("servers/*/*.conf"))


def test_sockets_of_a_killed_stack_are_cleared(tmp_path: Path, model: Path) -> None:
    """By whoever comes next: the server was killed, and its supervisor tells nobody."""
    with fake_stack(with_tier(tmp_path, model, TIERS["object_store"])) as stack:
        record = read_record(stack.folder)
        assert record is not None
        stack.servers[0].stop()
        assert [os.path.lexists(path) for path in record.sockets] == [True] * 4

        clear_recorded(tmp_path, msgspec.structs.replace(record, processes=[], daemon=None))
        assert not any(map(os.path.lexists, record.sockets))


def test_an_object_stores_blocks_are_there_at_the_next_up(tmp_path: Path, model: Path) -> None:
    """Its data stays in the state folder, whatever ports it gets."""
    spec = with_tier(tmp_path, model, TIERS["object_store"])
    with fake_stack(spec) as stack, opened_worker(stack) as worker:
        store(stack, worker)
    with fake_stack(spec) as stack, opened_worker(stack) as worker:
        assert is_served_from_tier(stack, worker)


def test_a_server_that_died_is_used_again(tmp_path: Path, model: Path) -> None:
    """Started anew on its port and with its password, it keeps blocks as before."""
    with (
        fake_stack(with_tier(tmp_path, model, TIERS["valkey"])) as stack,
        opened_worker(stack) as worker,
    ):
        store(stack, worker, first=0)
        (server,) = stack.servers
        server.process.kill()
        assert stack.ended() == [server]
        server.begin_again()
        wait_until(server.is_restarted, "restarted")
        store(stack, worker, first=500)


def test_strangers_are_refused(tmp_path: Path, model: Path) -> None:
    """Another user of the machine, who knows no password, gets nothing out of the servers."""
    tiers = [TIERS["valkey"], TIERS["object_store"]]
    daemon = {"pool_bytes": "16MiB", "tiers": tiers}
    with fake_stack(spec_of(tmp_path, model, {"daemon": daemon})) as stack:
        valkey, objects = stack.servers
        with socket.create_connection(("127.0.0.1", valkey.server.port), HANG_S) as connection:
            connection.sendall(b"DBSIZE\r\n")
            assert connection.recv(100).startswith(b"-NOAUTH")
        answer = httpx.get(f"http://{objects.address}/kvkeep/", trust_env=False, timeout=HANG_S)
        assert answer.status_code == 403


def test_a_server_that_the_file_names_lives_with_the_stack(tmp_path: Path, model: Path) -> None:
    """It answers before engines start, comes back when it dies, and goes with all it wrote."""
    command = [sys.executable, "-m", "http.server", "{web.pages}", "--bind", "127.0.0.1"]
    server = {"name": "web", "command": command, "ports": {"pages": 0}, "ready": "pages/"}
    engines = [{"name": "a", "connector": "none", "kv_cache_bytes": "1MiB"}]
    values = {"daemon": {"enabled": False}, "servers": [server], "engines": engines}
    with fake_stack(spec_of(tmp_path, model, values)) as stack:
        (web,) = stack.named_servers
        url = f"http://127.0.0.1:{web.server.ports['pages']}/"
        assert httpx.get(url, trust_env=False, timeout=HANG_S).status_code == 200
        assert stack.record().processes[0].name == "server web"
        web.process.kill()
        assert stack.ended() == [web]
        web.begin_again()
        wait_until(web.is_restarted, "restarted")
        assert httpx.get(url, trust_env=False, timeout=HANG_S).status_code == 200
    assert not (stack.folder / "servers" / "web").exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False, timeout=HANG_S)


def test_a_server_that_ends_at_once_stops_the_start(tmp_path: Path, model: Path) -> None:
    """The error has the last that it said, and nothing is left."""
    say = "raise SystemExit('MemoryError: no room for the cache')"
    server = {"name": "cache", "command": [sys.executable, "-c", say], "ports": {"p": 0}}
    engines = [{"name": "a", "connector": "none", "kv_cache_bytes": "1MiB"}]
    values = {"daemon": {"enabled": False}, "engines": engines}
    spec = spec_of(tmp_path, model, values | {"servers": [server | {"ready": "p"}]})

    with pytest.raises(UnavailableError, match=r"server cache ended while it started: .*no room"):
        fake_stack(spec).start()
    record = read_record(tmp_path / "state")
    assert record is not None
    assert (record.state, record.processes) == ("failed", [])
