"""A real Mooncake Store: its master, and processes that hold segments of its memory."""

import contextlib
import importlib.util
import itertools
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvkeep.tiers.mooncake.settings import MooncakeSettings
from kvkeep.tiers.mooncake.tier import MooncakeTier
from tests.servers.processes import START_TIMEOUT_S, ServerProcess, free_port

MIB = 1 << 20
SEGMENT_BYTES = 64 * MIB
CLIENT_TTL_S = 60
"""After so long without a sign of life the master gives up a process; its own default is 10 s. On a
busy machine one that is well may stand still for seconds."""
SHORT_TTL_S = 3
"""The same where one is killed, and is to be given up."""
UNFINISHED_S = 5
"""After so long a value may be put that a client was putting when it was killed; its own default
is 30 s, and 600 s until the room is used again."""

STORAGE = """
import os, signal, sys
os.environ["MC_TCP_BIND_ADDRESS"] = sys.argv[3]
from mooncake.store import MooncakeDistributedStore

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
store = MooncakeDistributedStore()
segment_bytes, host = int(sys.argv[2]), sys.argv[3]
code = store.setup(host, "P2PHANDSHAKE", segment_bytes, 1 << 24, "tcp", "", sys.argv[1])
print(f"set up: {code}", flush=True)
signal.sigwait({signal.SIGTERM})
os._exit(0)
"""


class MooncakeStore:
    """One master and its storage processes; each may be frozen, killed and started again."""

    def __init__(
        self,
        segment_bytes: int = SEGMENT_BYTES,
        host: str = "127.0.0.1",
        within: Sequence[str] = (),
        client_ttl_s: int = CLIENT_TTL_S,
    ) -> None:
        package = importlib.util.find_spec("mooncake")
        assert package is not None, "mooncake-transfer-engine-non-cuda is not installed"
        assert package.origin is not None
        self._program = Path(package.origin).parent / "mooncake_master"
        self._port, self._metrics_port = free_port(), free_port()
        self._segment_bytes = segment_bytes
        self._host = host
        self._within = within
        self._client_ttl_s = client_ttl_s
        self.address = f"{host}:{self._port}"
        self.master = ServerProcess("mooncake-master", within)
        self.storages: list[ServerProcess] = []

    def start_master(self) -> None:
        """Start it, on the same port each time."""
        flags = {
            "rpc_port": self._port,
            "rpc_address": self._host,
            "metrics_host": self._host,
            "metrics_port": self._metrics_port,
            "client_ttl": self._client_ttl_s,
            "put_start_discard_timeout_sec": UNFINISHED_S,
            "put_start_release_timeout_sec": 2 * UNFINISHED_S,
            "rpc_thread_num": 2,
        }
        command = [str(self._program), *(f"--{name}={value}" for name, value in flags.items())]
        self.master.start(command, self._is_listening)

    def _is_listening(self) -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection((self._host, self._port), 1.0).close()
            return True
        return False

    def start_storage(self) -> None:
        """Start a process that offers a segment, and wait until the master knows it."""
        storage = ServerProcess("mooncake-storage", self._within)
        self.storages.append(storage)
        settings = (self.address, str(self._segment_bytes), self._host)
        command = [sys.executable, "-c", STORAGE, *settings]
        storage.start(command, lambda: _is_set_up(storage.log))

    def stop(self) -> None:
        """End everything."""
        for process in [*self.storages, self.master]:
            process.kill()  # a segment that is given back politely takes its time
            process.stop()


def _is_set_up(log: Path) -> bool:
    found = re.search(r"^set up: (-?\d+)$", log.read_text(errors="replace"), flags=re.M)
    if found is None:
        return False
    assert found[1] == "0", f"the segment could not be mounted: code {found[1]}"
    return True


@contextlib.contextmanager
def mooncake_store(
    num_storages: int = 1, segment_bytes: int = SEGMENT_BYTES, *, client_ttl_s: int = CLIENT_TTL_S
) -> Iterator[MooncakeStore]:
    """A store that is gone afterwards."""
    store = MooncakeStore(segment_bytes, client_ttl_s=client_ttl_s)
    try:
        store.start_master()
        for _ in range(num_storages):
            store.start_storage()
        yield store
    finally:
        store.stop()


_numbers = itertools.count()


def open_tier(store: MooncakeStore, **settings: object) -> MooncakeTier:
    """A tier that can be used, with a prefix that no other has."""
    own = {"master": store.address, "prefix": f"test/{next(_numbers)}/", "value_bytes_max": MIB}
    own |= {"timeout_s": 30.0}  # a busy machine is no fault of the store
    tier = MooncakeTier(MooncakeSettings(**(own | settings)))  # type: ignore[arg-type]
    is_ready = tier.wait_ready(START_TIMEOUT_S)
    if not is_ready:
        tier.close()
    assert is_ready, "the tier did not become ready"
    return tier
