"""What a daemon says of its blocks, over real sockets: live, anew, after its death, and to whom."""

import asyncio
import hashlib
import stat
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from kvkeep.daemon import announcer as announcing
from kvkeep.daemon.announcer import Announcer
from kvkeep.model.announced import number_of
from kvkeep.model.clock import SystemClock
from kvkeep.model.ids import CANARY_NAMESPACE, BlockHash, BlockKey, Namespace
from kvkeep.router.events.feeds import REPLAY_SUFFIX
from kvkeep.router.events.pool_blocks import PoolBlocks
from kvkeep.router.events.zmq_source import ZmqAddress, ZmqSource
from tests.integration.daemons import (
    COMMAND,
    NAMESPACE,
    Daemon,
    Worker,
    opened_prefixes,
    running_daemon,
)
from tests.waiting import until

VARIABLE = "KVKEEP_EVENTS_SOCKET"
NAME = "pool"
NUM_NAMES = 4000


def hash_of(number: int) -> BlockHash:
    """As good as any: all bits of a number that is announced count."""
    return BlockHash(hashlib.blake2b(number.to_bytes(8, "big"), digest_size=32).digest())


def hashes_of(first: int, num_blocks: int) -> list[BlockHash]:
    return [hash_of(number) for number in range(first, first + num_blocks)]


@asynccontextmanager
async def hearing(path: Path) -> AsyncIterator[tuple[PoolBlocks, ZmqSource]]:
    """A router that knows what the first numbers stand for: block ``n`` for ``hash_of(n)``."""
    pools = PoolBlocks(NUM_NAMES)
    pools.joined("engine", NAME)
    pools.name([number_of(block_hash) for block_hash in hashes_of(0, NUM_NAMES)], range(NUM_NAMES))
    address = f"ipc://{path}"
    source = ZmqSource(NAME, ZmqAddress(address, address + REPLAY_SUFFIX), pools)
    task = asyncio.create_task(source.run())
    try:
        await until(lambda: source.is_connected)
        yield pools, source
        pools.check()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def held(pools: PoolBlocks, blocks: Sequence[int]) -> int:
    return pools.extend(blocks, "engine", 0, {}, 0)


@asynccontextmanager
async def announcing_at(path: Path, below: set[BlockKey] | None = None) -> AsyncIterator[Announcer]:
    announcer = Announcer(path, SystemClock(), lambda key: key in (below or set()))
    announcer.open()
    try:
        yield announcer
    finally:
        await announcer.close()


def key_of(number: int, namespace: Namespace = NAMESPACE) -> BlockKey:
    return BlockKey(namespace, hash_of(number))


# --- A real daemon -------------------------------------------------------------------------------


async def test_what_a_daemon_keeps_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are known when they are stored and no more when they are evicted, and so after a kill.

    The daemon's own count is what the router must arrive at.
    """
    path = tmp_path / "events"
    monkeypatch.setenv(VARIABLE, str(path))
    with running_daemon() as daemon:
        with Worker(daemon) as worker:
            async with hearing(path) as (pools, source):
                worker.store(hashes_of(0, 10))
                await until(lambda: held(pools, range(20)) == 10)
                worker.store(hashes_of(10, 2500))
                num_ready = daemon.gauge("slots_ready")
                await until(lambda: held(pools, range(2509, 2500, -1)) == 9)
                await until(lambda: pools.num_blocks(NAME) == num_ready)

                assert num_ready < 2510
                assert held(pools, range(20)) == 0
                assert source.counters.num_refused == 0
                daemon.kill()
                await until(lambda: not source.is_connected)
                daemon.start()
                await until(lambda: source.is_connected and pools.num_blocks(NAME) == num_ready)
        async with hearing(path) as (pools, _):
            await until(lambda: pools.num_blocks(NAME) == num_ready)


def test_only_this_user_can_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sockets are private, nothing listens without them, and they go with the daemon."""
    path = tmp_path / "events"
    monkeypatch.setenv(VARIABLE, str(path))
    with running_daemon() as daemon:
        paths = [path, path.with_name("events.replay")]
        modes = [stat.S_IMODE(each.stat().st_mode) for each in paths]
        code = daemon.stop()

    assert [mode & 0o077 for mode in modes] == [0, 0]
    assert code == 0
    assert not any(each.exists() for each in paths)


def _ended_at_start() -> subprocess.CompletedProcess[str]:
    """A daemon that refuses what its environment says."""
    daemon = Daemon()
    command = [*COMMAND, f"--socket={daemon.socket}", f"--pool={daemon.pool}"]
    ended = subprocess.run(
        [*command, "--pool-bytes=16MiB"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    daemon.pool.unlink(missing_ok=True)
    return ended


@pytest.mark.parametrize("where", ["file", "long"])
def test_a_socket_that_can_not_be_had_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """One sentence, exit code 2, and what lay there still does."""
    path = tmp_path / ("x" * 120 if where == "long" else "file")
    if where == "file":
        path.write_text("precious")
    monkeypatch.setenv(VARIABLE, str(path))
    ended = _ended_at_start()

    assert ended.returncode == 2
    assert "events_socket" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert where == "long" or path.read_text() == "precious"


def test_nobody_loses_the_socket_that_it_listens_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another daemon that is told to take it is refused; the first goes on."""
    path = tmp_path / "events"
    monkeypatch.setenv(VARIABLE, str(path))
    with running_daemon() as daemon:
        both = (path, Path(daemon.socket))
        inodes = [each.stat().st_ino for each in both]
        for taken in both:
            monkeypatch.setenv(VARIABLE, str(taken))
            ended = _ended_at_start()

            assert (ended.returncode, f"listens on {taken}" in ended.stderr) == (2, True)
        assert [each.stat().st_ino for each in both] == inodes
        with opened_prefixes(daemon):
            assert daemon.gauge("sessions") == 1


# --- Its announcer -------------------------------------------------------------------------------


async def test_who_comes_late_hears_all_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where messages are not kept any more, one message says what is there now, and goes on."""
    monkeypatch.setattr(announcing, "FLUSH_S", 0.0)
    monkeypatch.setattr(announcing, "KEPT_MAX", 2)
    async with announcing_at(tmp_path / "e") as announcer:
        for number in range(10):
            announcer.ready(number, key_of(number))
            await asyncio.sleep(0.001)
        announcer.freed(5)
        async with hearing(tmp_path / "e") as (pools, source):
            await until(lambda: pools.num_blocks(NAME) == 9)
            at_first = held(pools, range(10))
            announcer.ready(5, key_of(5))
            await until(lambda: held(pools, range(10)) == 10)

            assert at_first == 5
            assert source.counters.num_batches <= 5


async def test_blocks_below_the_pool_are_still_there(tmp_path: Path) -> None:
    """A block that left the pool counts as long as a lower tier has it."""
    below = {key_of(0), key_of(1)}
    async with (
        announcing_at(tmp_path / "e", below) as announcer,
        hearing(tmp_path / "e") as (pools, _),
    ):
        for number in range(3):
            announcer.ready(number, key_of(number))
        await until(lambda: held(pools, range(3)) == 3)
        for number in range(3):
            announcer.freed(number)
        await until(lambda: pools.num_blocks(NAME) == 2)
        below.remove(key_of(1))
        announcer.tick()
        await until(lambda: held(pools, range(3)) == 1)
        announcer.emptied()
        await until(lambda: pools.num_blocks(NAME) == 0)


async def test_no_token_and_no_canary_is_told(tmp_path: Path) -> None:
    """What goes over the socket is numbers of blocks, and none of what engines prove paths with."""
    async with announcing_at(tmp_path / "e") as announcer:
        announcer.ready(0, key_of(1))
        announcer.ready(1, key_of(2, CANARY_NAMESPACE))
        told = [msgspec.msgpack.decode(payload) for _, payload in announcer._since(0)]
    events = [event for _, batch, _ in told for event in batch]

    assert [event["type"] for event in events] == ["AllBlocksCleared", "BlockStored"]
    assert events[1]["block_hashes"] == [number_of(hash_of(1))]
    assert events[1]["token_ids"] == []
