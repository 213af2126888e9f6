"""The media of the fault table that are servers: real ones, broken for real where that is possible.

A full, read-only or failing disk is, for a server, whatever makes it refuse in the same way: the
docstring of each place says what.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from kvkeep.daemon.movement.opening import open_medium
from kvkeep.daemon.tier_settings import (
    AnyTierSettings,
    MooncakeTierSettings,
    ObjectStoreTierSettings,
    ValkeyTierSettings,
)
from kvkeep.testing.tcp_proxy import FaultyRelay, NetworkFault
from kvkeep.tiers.base import Tier
from tests.fault.places import OVERHEAD_BYTES_MAX, DiskPlace, Kept, MemoryPlace, Place
from tests.fault.small_disks import failing_disk, small_tmpfs
from tests.fault.table import (
    BATCH_BYTES,
    CLOCK,
    DAMAGE,
    NUMBERS,
    TICK_S,
    VALUE_BYTES,
    Chain,
    Fault,
)
from tests.integration.daemons import wait_until
from tests.servers.hosts import Host
from tests.servers.mooncake import SHORT_TTL_S, MooncakeStore, mooncake_store
from tests.servers.processes import ServerProcess, free_port
from tests.servers.seaweed import BUCKET, SeaweedServer
from tests.servers.valkey import ValkeyServer
from tests.waiting import HANG_S

TIMEOUT_S = 1.0
"""Of a tier for one request, where one that hangs is to be given up."""
DEADLINE_S = 20.0
"""Of the queue for one call: a read of Mooncake may be three requests, and wait for a lane."""
ANSWERED = (*DAMAGE, Fault.NO_ROOM, Fault.READ_ONLY)
"""Faults in which the server answers, however busy the machine is."""
SLOW_FACTOR = 10
MID_BYTES = 2 * VALUE_BYTES + VALUE_BYTES // 2
"""In the middle of a value, in the middle of a batch."""
STORE_BYTES = 16 << 20
"""Of the segment of a Mooncake Store: soon full."""

_PREFIXES = (f"cell-{number}/" for number in itertools.count())
"""For each cell its own: what others left is not seen."""


def limits_of(fault: Fault) -> dict[str, float]:
    """Of a tier, and of the queue before it."""
    if fault in ANSWERED:
        return {"timeout_s": HANG_S, "deadline_s": 2 * HANG_S}
    return {"timeout_s": TIMEOUT_S, "deadline_s": DEADLINE_S}


@dataclass(frozen=True)
class Servers:
    """What all cells of the table share; each leaves it well."""

    valkey: ValkeyServer
    seaweed: SeaweedServer
    mooncake: MooncakeStore
    far_mooncake: MooncakeStore | None
    """On another host, behind a cable; None where hosts can't be made."""
    near: Host | None
    """The host at this end of the cable."""


MORTAL = {
    ("valkey", Fault.KILLED),
    ("object_store", Fault.KILLED),
    ("mooncake", Fault.KILLED),
    ("mooncake", Fault.IO_ERROR),
}
"""Cells with servers of their own: what a test starts must end with it."""


@contextlib.contextmanager
def opened_place(kind: str, fault: Fault, folder: Path, servers: Servers) -> Iterator[Place]:
    """The place of a cell."""
    with contextlib.ExitStack() as stack:
        if (kind, fault) in MORTAL:
            servers = _with_own(kind, servers, stack)
        if kind == "memory":
            yield MemoryPlace(fault)
        elif kind == "disk":
            disk = folder
            if fault is Fault.NO_ROOM:
                disk = stack.enter_context(small_tmpfs(folder / "disk"))
            if fault is Fault.IO_ERROR:
                disk = stack.enter_context(failing_disk(folder))
            yield DiskPlace(disk, fault)
        elif kind == "mooncake":
            is_far = fault in (Fault.SLOW, Fault.CUT)
            place = (FarMooncakePlace if is_far else MooncakePlace)(servers, fault)
            stack.callback(place.close)
            yield place
        else:
            server = servers.valkey if kind == "valkey" else servers.seaweed
            relay = stack.enter_context(FaultyRelay(("127.0.0.1", server.port), seed=7))
            yield _RELAYED[kind](servers, relay, fault)


def _with_own(kind: str, servers: Servers, stack: contextlib.ExitStack) -> Servers:
    """The same with a server that may be killed."""
    if kind == "mooncake":
        store = stack.enter_context(mooncake_store(1, STORE_BYTES, client_ttl_s=SHORT_TTL_S))
        return replace(servers, mooncake=store)
    if kind == "valkey":
        valkey = ValkeyServer()
        stack.callback(valkey.stop)
        return replace(servers, valkey=valkey.run())
    seaweed = SeaweedServer()
    stack.callback(seaweed.stop)
    return replace(servers, seaweed=seaweed.run())


@contextlib.contextmanager
def dead(server: ServerProcess, start: Callable[[], object]) -> Iterator[None]:
    """A server that was killed; started again in the end."""
    server.kill()
    try:
        yield
    finally:
        start()


@contextlib.contextmanager
def frozen(server: ServerProcess) -> Iterator[None]:
    """A server that stands still."""
    server.freeze()
    try:
        yield
    finally:
        server.thaw()


async def slow_speed(chain: Chain) -> float:
    """A tenth of the bytes a second that a read has now."""
    begun_s = CLOCK.now_s()
    assert await chain.read(NUMBERS) == list(NUMBERS)
    return BATCH_BYTES / (CLOCK.now_s() - begun_s) / SLOW_FACTOR


class RelayedPlace(Place):
    """A server behind a network that breaks."""

    def __init__(self, settings: AnyTierSettings, relay: FaultyRelay, fault: Fault) -> None:
        super().__init__(settings, fault)
        self._relay = relay

    @contextlib.asynccontextmanager
    async def really_broken(self, chain: Chain) -> AsyncIterator[None]:
        """The network, or the server itself."""
        if self._fault not in (Fault.SLOW, Fault.CUT):
            with self.broken_server():
                yield
            return
        if self._fault is Fault.CUT:
            struck = self._relay.strike(NetworkFault.CUT, after_bytes=MID_BYTES)
        else:
            bytes_per_s = await slow_speed(chain)
            struck = self._relay.strike(NetworkFault.SLOW, bytes_per_s=bytes_per_s)
        try:
            yield
            assert struck.is_set()
        finally:
            self._relay.heal()

    @contextlib.contextmanager
    def broken_server(self) -> Iterator[None]:
        """The server."""
        raise NotImplementedError
        yield


class ValkeyPlace(RelayedPlace):
    """A Valkey server.

    Full: its ``maxmemory`` is used up. Read-only: a replica of a server that is away. Failing: it
    can't write its snapshots, and refuses writes for that.
    """

    kind = "valkey"

    def __init__(self, servers: Servers, relay: FaultyRelay, fault: Fault) -> None:
        self._server = servers.valkey
        self._direct = ValkeyTierSettings(url=self._server.url)
        url = f"valkey://127.0.0.1:{relay.address[1]}"
        settings = msgspec.structs.replace(ValkeyTierSettings(url=url), **limits_of(fault))
        super().__init__(settings, relay, fault)

    def back_door(self) -> contextlib.AbstractContextManager[Tier]:
        """Past the network."""
        return contextlib.closing(open_medium(self._direct, VALUE_BYTES + OVERHEAD_BYTES_MAX))

    @contextlib.contextmanager
    def broken_server(self) -> Iterator[None]:
        """The server."""
        if self._fault is Fault.KILLED:
            with dead(self._server, self._server.run):
                yield
        elif self._fault is Fault.FROZEN:
            with frozen(self._server):
                yield
        elif self._fault is Fault.IO_ERROR:
            with self._failing_snapshots():
                yield
        else:
            port = str(free_port())
            begin, end = {
                Fault.NO_ROOM: (("CONFIG", "SET", "maxmemory", "1"), ("maxmemory", "0")),
                Fault.READ_ONLY: (("REPLICAOF", "127.0.0.1", port), ("REPLICAOF", "NO", "ONE")),
            }[self._fault]
            self._tell(*begin)
            try:
                yield
            finally:
                self._tell(*(("CONFIG", "SET", *end) if end[0] == "maxmemory" else end))

    @contextlib.contextmanager
    def _failing_snapshots(self) -> Iterator[None]:
        in_the_way = self._server.folder / "dump.rdb"
        in_the_way.mkdir()
        self._tell("CONFIG", "SET", "save", "3600 1")
        self._tell("BGSAVE")
        wait_until(self._has_failed, "a snapshot failed")
        try:
            yield
        finally:
            self._tell("CONFIG", "SET", "save", "")
            in_the_way.rmdir()

    def _has_failed(self) -> bool:
        return b"rdb_last_bgsave_status:err" in self._server.command("INFO", "persistence")

    def _tell(self, *words: str) -> None:
        answer = self._server.command(*words)
        assert answer[:1] == b"+", answer


class ObjectStorePlace(RelayedPlace):
    """An S3 server.

    Full: no volume may take its values. Read-only: the filer is told so. Failing: the files of its
    volumes are cut short, and whole again afterwards.
    """

    kind = "object_store"

    def __init__(self, servers: Servers, relay: FaultyRelay, fault: Fault) -> None:
        self._server = servers.seaweed
        self._direct = ObjectStoreTierSettings(
            url=f"s3://{BUCKET}", prefix=next(_PREFIXES), endpoint=self._server.endpoint
        )
        settings = msgspec.structs.replace(
            self._direct,
            endpoint=f"http://127.0.0.1:{relay.address[1]}",
            **limits_of(fault),
        )
        super().__init__(settings, relay, fault)

    def back_door(self) -> contextlib.AbstractContextManager[Tier]:
        """Past the network."""
        return contextlib.closing(open_medium(self._direct, VALUE_BYTES + OVERHEAD_BYTES_MAX))

    @contextlib.contextmanager
    def broken_server(self) -> Iterator[None]:
        """The server."""
        server = self._server
        if self._fault is Fault.KILLED:
            with dead(server, server.run):
                yield
        elif self._fault is Fault.FROZEN:
            with frozen(server):
                yield
        elif self._fault is Fault.IO_ERROR:
            with server.cut_volumes():
                yield
        else:
            rules: dict[Fault, dict[str, object]] = {
                Fault.NO_ROOM: {"diskType": "none"},
                Fault.READ_ONLY: {"readOnly": True},
            }
            server.set_rule(rules[self._fault])
            wait_until(lambda: not server.takes_values(), "no value is taken")
            try:
                yield
            finally:
                server.set_rule({})


_RELAYED = {"valkey": ValkeyPlace, "object_store": ObjectStorePlace}


class MooncakePlace(Place):
    """A Mooncake Store.

    Full: its segment is. Failing: the process that holds the values is gone, and the master does
    not know it yet. It can't be read-only, so that is a shim. Killed is the master, frozen is the
    process that holds the values.
    """

    kind = "mooncake"
    evicts = True
    num_others = 2 * STORE_BYTES // VALUE_BYTES

    def __init__(self, servers: Servers, fault: Fault) -> None:
        self._store = self.store_of(servers)
        settings = MooncakeTierSettings(master=self._store.address, prefix=next(_PREFIXES))
        super().__init__(msgspec.structs.replace(settings, **limits_of(fault)), fault)
        # One client for the chain and for what is done behind its back: a start takes a second.
        self._client = self.opened()

    def store_of(self, servers: Servers) -> MooncakeStore:
        """The one of this place."""
        return servers.mooncake

    def opened(self) -> Tier:
        """A client of the store."""
        return open_medium(self.settings, VALUE_BYTES + OVERHEAD_BYTES_MAX)

    def bare(self, settings: AnyTierSettings, value_bytes_max: int) -> Tier:
        """The same for all."""
        return Kept(self._client)

    def close(self) -> None:
        """End the client."""
        self._client.close()

    @contextlib.asynccontextmanager
    async def really_broken(self, chain: Chain) -> AsyncIterator[None]:
        """A process of the store, or its room."""
        store = self._store
        if self._fault is Fault.NO_ROOM:
            yield
        elif self._fault is Fault.KILLED:
            with dead(store.master, store.start_master):
                yield
        elif self._fault is Fault.IO_ERROR:
            with dead(store.storages[-1], store.start_storage):
                yield
        else:
            with frozen(store.storages[-1]):
                yield


class FarMooncakePlace(MooncakePlace):
    """On another host; the cable is slow, or pulled out in the middle of a value."""

    def __init__(self, servers: Servers, fault: Fault) -> None:
        assert servers.near is not None
        self._near = servers.near
        super().__init__(servers, fault)

    def store_of(self, servers: Servers) -> MooncakeStore:
        """The one of this place."""
        assert servers.far_mooncake is not None
        return servers.far_mooncake

    def opened(self) -> Tier:
        """A client on the near host: its threads and its process are begun there."""
        with self._near.entered():
            return super().opened()

    @contextlib.asynccontextmanager
    async def really_broken(self, chain: Chain) -> AsyncIterator[None]:
        """The cable."""
        near = self._near
        if self._fault is Fault.SLOW:
            near.slow(await slow_speed(chain))
            try:
                yield
            finally:
                near.hurry()
            return
        # Part of a batch comes at once, and the rest would take minutes.
        near.slow(3 * VALUE_BYTES / 100, at_once_bytes=3 * VALUE_BYTES)
        before = near.received_bytes()
        reading = asyncio.ensure_future(chain.attempt(chain.read(NUMBERS)))
        while near.received_bytes() < before + 2 * VALUE_BYTES:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(TICK_S / 4)
        near.cut()
        near.hurry()
        try:
            assert await reading != list(NUMBERS)
            yield
        finally:
            near.join()
