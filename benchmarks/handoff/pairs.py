"""Two engines of one core each and a router that hands over between them, by transport."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.engines import (
    HOST,
    Engine,
    EngineSpec,
    engine,
    free_port,
    process,
    wait_until,
)
from benchmarks.peers.subjects import kvkeep

PREFILL_CORE, DECODE_CORE = "0", "1"
MIN_TOKENS = 256
NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
NIXL_BYTES = "vllm:nixl_bytes_transferred_sum"


@dataclass(frozen=True)
class Pair:
    """A running pair; who asks the router is answered by the decode engine."""

    router: Engine
    prefill: Engine
    decode: Engine
    daemon: Engine | None
    """None where blocks don't go through one."""

    def bytes_moved(self) -> float:
        """Bytes that the decode engine has got so far."""
        if self.daemon is not None:
            return float(self.daemon_counters()["bytes_loaded"])
        _, text = self.decode.call("GET", "/metrics")
        lines = text.decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(NIXL_BYTES))

    def daemon_counters(self) -> Mapping[str, int]:
        """What the daemon has counted."""
        assert self.daemon is not None
        counters: Mapping[str, int] = json.loads(self.daemon.call("GET", "/status")[1])["counters"]
        return counters


@contextmanager
def pair(transport: str, model: Path, folder: Path) -> Iterator[Pair]:
    """Start a pair that hands over by ``pool`` or ``nixl``, and stop it.

    Raises:
        EngineError: A process did not start.
    """
    with ExitStack() as stack:
        daemon = None
        specs = [_nixl_spec(model, core) for core in (PREFILL_CORE, DECODE_CORE)]
        if transport == "pool":
            served = stack.enter_context(kvkeep(folder))
            daemon = served.daemon
            specs = [served.spec(model, core) for core in (PREFILL_CORE, DECODE_CORE)]
        prefill, decode = (
            stack.enter_context(engine(spec, folder / f"{name}.log"))
            for name, spec in zip(("prefill", "decode"), specs, strict=True)
        )
        router = stack.enter_context(_router(transport, prefill, decode, folder))
        yield Pair(router, prefill, decode, daemon)


def _nixl_spec(model: Path, core: str) -> EngineSpec:
    environment = {
        "UCX_TLS": "tcp,self,sysv,posix,cma",
        "UCX_NET_DEVICES": "lo",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": HOST,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
    }
    return EngineSpec(Path(sys.executable), model, core, NIXL, environment)


@contextmanager
def _router(transport: str, prefill: Engine, decode: Engine, folder: Path) -> Iterator[Engine]:
    port = free_port()
    members: list[dict[str, Any]] = [
        {"url": f"http://{HOST}:{served.port}", "name": role, "role": role}
        for role, served in (("prefill", prefill), ("decode", decode))
    ]
    handoff = {"transport": transport, "min_tokens": MIN_TOKENS}
    config = folder / "router.yaml"
    settings = {"engines": members, "port": port, "handoff": handoff}
    config.write_text(json.dumps(settings | {"relay": {"connections_max": 64}}))
    command = [sys.executable, "-m", "kvkeep", "route", "--config", str(config)]
    with process(command, dict(os.environ), folder / "router.log") as child:
        client = Engine(port)
        wait_until(lambda: client.call("GET", "/health")[0] == 200, child, "the router")
        yield client
