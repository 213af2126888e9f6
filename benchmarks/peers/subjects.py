"""The subjects of a comparison: how each keeps KV outside the engine, and the servers it needs.

A subject starts its servers once and then any number of engines that share what is stored. None
of them is tuned further than its own documentation asks for, except where a default fails here;
the reason then stands beside the setting.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.engines import (
    BLOCK_TOKENS,
    HOST,
    LOOPBACK,
    Engine,
    EngineSpec,
    free_port,
    listens,
    process,
    wait_until,
)
from benchmarks.peers.environments import python_of

POOL_BYTES = 2 << 30

Transfer = Mapping[str, Any]


@dataclass(frozen=True)
class Served:
    """A subject whose servers run: what its engines need to use them.

    Args:
        python: Interpreter of the engines.
        kv_transfer_config: The engines' connector, or None.
        env: Further variables of the engines.
        daemon: Where kvkeep's own daemon tells what it counted.
    """

    python: Path
    kv_transfer_config: Transfer | None = None
    env: Mapping[str, str] | None = None
    daemon: Engine | None = None

    def spec(self, model: Path, cores: str) -> EngineSpec:
        """Return the settings of one engine of this subject."""
        return EngineSpec(
            python=self.python,
            model=model,
            cores=cores,
            kv_transfer_config=self.kv_transfer_config,
            env=self.env or {},
        )


@contextmanager
def on_engine(folder: Path) -> Iterator[Served]:
    """No connector: recomputation and the engine's own prefix cache."""
    yield Served(python=Path(sys.executable))


@contextmanager
def kvkeep(folder: Path) -> Iterator[Served]:
    """A kvkeep daemon, all digests checked."""
    socket_path, port, log = folder / "kvkeep.sock", free_port(), folder / "kvkeep-daemon.log"
    command = [sys.executable, "-m", "kvkeep", "daemon", "--socket", str(socket_path)]
    # A pool outlives its daemon, so a fresh one is named, and removed: cold must be cold.
    pool = Path(f"/dev/shm/kvkeep-bench-{os.getpid()}-{port}.pool")
    command += ["--pool", str(pool), "--pool-bytes", "2GiB", "--metrics-port", str(port)]
    with _removed(pool), process(command, _environment(), log) as child:
        status = Engine(port)
        wait_until(lambda: status.call("GET", "/health")[0] == 200, child, "the daemon")
        config = {
            "kv_connector": "KvkeepConnector",
            "kv_connector_module_path": "kvkeep.connector.plugin",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"socket": str(socket_path)},
        }
        yield Served(Path(sys.executable), config, daemon=status)


@contextmanager
def _removed(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _mooncake_master(folder: Path) -> tuple[list[str], int]:
    port = free_port()
    binary = python_of("mooncake").parent / "mooncake_master"
    command = [str(binary), f"--rpc_port={port}", f"--rpc_address={HOST}"]
    command += [f"--metrics_host={HOST}", f"--metrics_port={free_port()}", "--client_ttl=10"]
    return command, port


def _mooncake_served(folder: Path, master_port: int, settings: Transfer) -> Served:
    config = {
        "metadata_server": "P2PHANDSHAKE",
        "master_server_address": f"{HOST}:{master_port}",
        "protocol": "tcp",
        "device_name": "",
        "local_hostname": HOST,
        **settings,
    }
    path = folder / "mooncake.json"
    path.write_text(json.dumps(config))
    transfer = {
        "kv_connector": "MooncakeStoreConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {},
    }
    env = {"MOONCAKE_CONFIG_PATH": str(path)} | MOONCAKE_LIMITS
    return Served(python_of("mooncake"), transfer, env)


# With the defaults a load of 109 blocks is refused ("TCP lane queue-full rejection").
MOONCAKE_LIMITS = {
    "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "8192",
    "MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER": "8192",
}


@contextmanager
def mooncake(folder: Path) -> Iterator[Served]:
    """MooncakeStoreConnector of vLLM over TCP, the store inside the engine's own worker."""
    command, port = _mooncake_master(folder)
    log = folder / "mooncake-master.log"
    with process(command, _environment(), log) as child:
        wait_until(lambda: listens(port), child, "the Mooncake master")
        segment = {"mode": "embedded", "global_segment_size": POOL_BYTES}
        yield _mooncake_served(folder, port, segment | {"local_buffer_size": 256 << 20})


@contextmanager
def mooncake_shared(folder: Path) -> Iterator[Served]:
    """MooncakeStoreConnector of vLLM over TCP, the store in a process of its own."""
    command, port = _mooncake_master(folder)
    log, storage_log = folder / "mooncake-master.log", folder / "mooncake-storage.log"
    with process(command, _environment(), log) as master:
        wait_until(lambda: listens(port), master, "the Mooncake master")
        line = [str(python_of("mooncake")), str(Path(__file__).parent / "mooncake_storage.py")]
        line += [f"{HOST}:{port}", str(POOL_BYTES)]
        with process(line, _environment() | MOONCAKE_LIMITS, storage_log) as storage:
            wait_until(lambda: b"ready" in storage_log.read_bytes(), storage, "its storage")
            segment = {"mode": "standalone-store", "global_segment_size": 0}
            yield _mooncake_served(folder, port, segment | {"local_buffer_size": 256 << 20})


@contextmanager
def lmcache(folder: Path, chunk_tokens: int = 256) -> Iterator[Served]:
    """LMCache in multi-process mode: its server, and its own connector in the engine.

    Args:
        folder: For logs.
        chunk_tokens: What it stores as one object; a prompt's last, incomplete chunk is computed.
    """
    python, port, log = python_of("lmcache"), free_port(), folder / "lmcache-server.log"
    command = [str(python.parent / "lmcache"), "server", "--host", HOST, "--port", str(port)]
    command += ["--chunk-size", str(chunk_tokens), "--l1-size-gb", "2", "--eviction-policy", "LRU"]
    # Without these an engine on CPUs waits for ever: it copies by itself, through shared memory,
    # and the server's default expects CUDA handles.
    command += ["--supported-transfer-mode", "engine_driven"]
    command += ["--shm-name", f"kvkeep_bench_{port}", "--no-l1-use-lazy"]
    command += ["--http-port", str(free_port()), "--prometheus-port", str(free_port())]
    with process(command, _environment(), log) as child:
        wait_until(lambda: listens(port), child, "the LMCache server")
        transfer = {
            "kv_connector": "LMCacheMPConnector",
            "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "lmcache.mp.host": f"tcp://{HOST}",
                "lmcache.mp.port": port,
            },
        }
        yield Served(python, transfer)


def _environment() -> dict[str, str]:
    return dict(os.environ) | LOOPBACK


Subject = Callable[[Path], Any]

SUBJECTS: Mapping[str, Subject] = {
    "on-engine": on_engine,
    "kvkeep": kvkeep,
    "mooncake": mooncake,
    "lmcache": lmcache,
    "lmcache-32": partial(lmcache, chunk_tokens=BLOCK_TOKENS),
}
"""By name; each is a context manager over the folder of its logs, sockets and settings."""

SHARED_SUBJECTS: Mapping[str, Subject] = {"kvkeep": kvkeep, "mooncake": mooncake_shared}
"""The same for two engines that share one store."""
