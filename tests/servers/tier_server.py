"""Any kind of server below a daemon's pool, with what the daemon is told of it."""

import contextlib
from collections.abc import Callable, Iterator

from tests.servers.mooncake import mooncake_store
from tests.servers.processes import ServerProcess
from tests.servers.seaweed import BUCKET, KEY, SECRET, SeaweedServer
from tests.servers.valkey import ValkeyServer

SERVER_KINDS = ("valkey", "object_store", "mooncake")
S3_ENVIRONMENT = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
"""What a daemon's environment says where ``tier`` names no key."""


class TierServer:
    """A server that may be killed, and started again on its port."""

    def __init__(
        self, tier: dict[str, object], process: ServerProcess, start: Callable[[], object]
    ) -> None:
        self.tier = tier
        self._process = process
        self._start = start

    def kill(self) -> None:
        """End it without warning."""
        self._process.kill()

    def start_again(self) -> None:
        """Start it, and wait until it answers."""
        self._start()


PATIENT: dict[str, object] = {"timeout_s": 30.0, "deadline_s": 60.0}
"""A server that does not answer for a while is well: a busy machine is no fault."""


@contextlib.contextmanager
def tier_server(kind: str, *, num_storages: int = 1) -> Iterator[TierServer]:
    """A server that is gone afterwards.

    Args:
        kind: Of the tier.
        num_storages: Processes that lend memory to a Mooncake Store.
    """
    if kind == "mooncake":
        with mooncake_store(num_storages) as store:
            tier: dict[str, object] = {"kind": kind, "master": store.address, **PATIENT}
            yield TierServer(tier, store.master, store.start_master)
        return
    if kind == "valkey":
        valkey = ValkeyServer()
        tier, process, start = {"kind": kind, "url": valkey.url, **PATIENT}, valkey, valkey.run
    else:
        weed = SeaweedServer()
        tier = {"kind": kind, "url": f"s3://{BUCKET}", "endpoint": weed.endpoint, **PATIENT}
        process, start = weed, weed.run  # type: ignore[assignment]
    try:
        start()
        yield TierServer(tier, process, start)
    finally:
        process.stop()
