"""What a Valkey tier's caller sees when the server or the way to it fails."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvkeep.model.errors import UnavailableError
from kvkeep.testing.tcp_proxy import FaultyRelay, NetworkFault, Towards
from kvkeep.testing.tier_contract import VALUE_BYTES, block_key, read, value_bytes, write
from kvkeep.tiers.entry_names import entry_name
from kvkeep.tiers.valkey import ValkeySettings, ValkeyTier
from tests.integration.daemons import wait_until
from tests.servers.valkey import ValkeyServer

TIMEOUT_S = 1.0
"""Of the tests in which it passes."""
GENEROUS_S = 60.0
"""Of the others, which must not end for want of time on a busy machine."""
MID_BATCH_BYTES = 2 * VALUE_BYTES + VALUE_BYTES // 2
PREFIX = "kvkeep/"


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    server = ValkeyServer().run()
    yield server
    server.stop()


@pytest.fixture
def relay(server: ValkeyServer) -> Iterator[FaultyRelay]:
    """The way to the server."""
    with FaultyRelay(("127.0.0.1", server.port), seed=7) as relay:
        yield relay


def opened(relay: FaultyRelay, timeout_s: float) -> ValkeyTier:
    """A tier behind the relay."""
    url = f"valkey://127.0.0.1:{relay.address[1]}"
    return ValkeyTier(ValkeySettings(url=url, timeout_s=timeout_s, prefix=PREFIX))


@pytest.fixture
def tier(relay: FaultyRelay) -> Iterator[ValkeyTier]:
    tier = opened(relay, GENEROUS_S)
    yield tier
    tier.close()


@pytest.fixture
def hasty(relay: FaultyRelay) -> Iterator[ValkeyTier]:
    """The same values, and little time."""
    tier = opened(relay, TIMEOUT_S)
    yield tier
    tier.close()


def in_background(tier: ValkeyTier, verb: str) -> tuple[threading.Thread, list[BaseException]]:
    """Write or read eight values in a thread; returns it, and the errors it will have met."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            if verb == "write":
                write(tier, range(8))
            else:
                read(tier, [block_key(number) for number in range(8)])
        except UnavailableError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, errors


def assert_works(tier: ValkeyTier) -> None:
    """What is written now is read."""
    assert write(tier, [20]) == [True]
    assert read(tier, [block_key(20)]) == [value_bytes(20)]


def works(tier: ValkeyTier) -> bool:
    """The same of a tier whose calls have little time, and may be too late on a busy machine."""
    with contextlib.suppress(UnavailableError):
        assert_works(tier)
        return True
    return False


@pytest.mark.parametrize("verb", ["write", "read"])
def test_a_server_killed_in_mid_batch(
    tier: ValkeyTier, hasty: ValkeyTier, relay: FaultyRelay, server: ValkeyServer, verb: str
) -> None:
    """The batch is an error; a server started again empty is all misses, and works."""
    write(tier, range(8))
    towards = Towards.SERVER if verb == "write" else Towards.CLIENT
    reached = relay.strike(NetworkFault.FROZEN, towards=towards, after_bytes=MID_BATCH_BYTES)
    thread, errors = in_background(hasty, verb)
    assert reached.wait(GENEROUS_S)
    server.kill()
    thread.join(GENEROUS_S)
    server.run()
    relay.heal()

    assert [type(error) for error in errors] == [UnavailableError]
    assert read(tier, [block_key(number) for number in range(8)]) == [None] * 8
    wait_until(lambda: works(hasty), "it works")


@pytest.mark.parametrize("verb", ["write", "read", "lookup", "keys", "delete"])
def test_a_frozen_server(
    tier: ValkeyTier, hasty: ValkeyTier, server: ValkeyServer, verb: str
) -> None:
    """Every call ends within its time limit, and works when the server goes on."""
    calls: dict[str, Callable[[], object]] = {
        "write": lambda: write(hasty, range(8)),
        "read": lambda: read(hasty, [block_key(1)]),
        "lookup": lambda: hasty.lookup([block_key(1)]),
        "keys": lambda: list(hasty.keys()),
        "delete": lambda: hasty.delete([block_key(1)]),
    }
    write(tier, [1])
    server.freeze()
    begun_s = time.perf_counter()
    try:
        with pytest.raises(UnavailableError, match=r"did not finish within 1\.0 s"):
            calls[verb]()
        took_s = time.perf_counter() - begun_s
    finally:
        server.thaw()

    assert TIMEOUT_S * 0.9 <= took_s < GENEROUS_S
    wait_until(lambda: works(hasty), "it works")


@pytest.mark.parametrize("after_bytes", [0, 3, 9, 40, 100_000, MID_BATCH_BYTES])
def test_a_network_cut_in_mid_value(tier: ValkeyTier, relay: FaultyRelay, after_bytes: int) -> None:
    """In a reply's first line, in a head, in a value: an error, and no byte too many."""
    write(tier, range(8))
    relay.strike(NetworkFault.CUT, after_bytes=after_bytes)
    with pytest.raises(UnavailableError, match="can't be reached"):
        read(tier, [block_key(number) for number in range(8)])
    relay.heal()

    assert read(tier, [block_key(3)]) == [value_bytes(3)]
    assert_works(tier)


def test_a_cut_write_is_whole_or_absent(tier: ValkeyTier, relay: FaultyRelay) -> None:
    """What the server has of a batch that broke off is read whole, and the rest is a miss."""
    relay.strike(NetworkFault.CUT, towards=Towards.SERVER, after_bytes=MID_BATCH_BYTES)
    with pytest.raises(UnavailableError):
        write(tier, range(8))
    relay.heal()

    found = read(tier, [block_key(number) for number in range(8)])

    assert found == [value_bytes(0), value_bytes(1), *[None] * 6]


def test_a_trickling_network(tier: ValkeyTier, hasty: ValkeyTier, relay: FaultyRelay) -> None:
    """Bytes that keep coming do not stretch the limit."""
    write(tier, range(2))
    # At this rate two values take ten times as long as a call that must end may.
    relay.strike(NetworkFault.SLOW, bytes_per_s=2 * VALUE_BYTES / (10 * GENEROUS_S))
    begun_s = time.perf_counter()
    with pytest.raises(UnavailableError, match="did not finish within"):
        read(hasty, [block_key(0), block_key(1)])

    assert time.perf_counter() - begun_s < GENEROUS_S


def test_refused_connections(tier: ValkeyTier, relay: FaultyRelay) -> None:
    """An error at once, and recovery by itself."""
    relay.strike(NetworkFault.REFUSED)
    with pytest.raises(UnavailableError, match="can't be reached"):
        read(tier, [block_key(1)])
    relay.heal()

    assert_works(tier)


def test_a_truncated_value_is_a_miss(tier: ValkeyTier, server: ValkeyServer) -> None:
    """So is one that has grown, and one cut inside its head; their neighbours are hits."""
    write(tier, range(5))
    for number, length in ((1, 1000), (2, 10), (3, 0)):
        name = entry_name(block_key(number), PREFIX)
        script = "server.call('SET', KEYS[1], server.call('GETRANGE', KEYS[1], 0, ARGV[1]))"
        server.command("EVAL", script, "1", name, str(length))
    server.command("APPEND", entry_name(block_key(4), PREFIX), "!")

    found = read(tier, [block_key(number) for number in range(5)], VALUE_BYTES + 10)

    assert found == [value_bytes(0), None, None, None, None]


def test_a_foreign_value_is_a_miss(tier: ValkeyTier, server: ValkeyServer) -> None:
    """A stranger's string, a list, and another block's value under our key; then ours again."""
    write(tier, range(4))
    names = [entry_name(block_key(number), PREFIX) for number in range(4)]
    server.command("SET", names[0], "x" * VALUE_BYTES)
    server.command("UNLINK", names[1])
    server.command("LPUSH", names[1], "x")
    server.command("COPY", names[3], names[2], "REPLACE")

    found = read(tier, [block_key(number) for number in range(4)])

    assert found == [None, None, None, value_bytes(3)]
    assert tier.lookup([block_key(1)]) == [False]
    assert write(tier, range(3)) == [True] * 3
    assert read(tier, [block_key(0), block_key(1)]) == [value_bytes(0), value_bytes(1)]


def test_a_server_started_again_while_idle(tier: ValkeyTier, server: ValkeyServer) -> None:
    """Connections kept from before are replaced without an error: everything is a miss."""
    write(tier, range(3))
    server.kill()
    server.run()

    assert read(tier, [block_key(number) for number in range(3)]) == [None] * 3
    assert_works(tier)


def test_connections_that_nobody_needs_are_closed(
    server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a moment of several threads opened does not stay open for good."""
    tier = ValkeyTier(ValkeySettings(url=server.url, timeout_s=GENEROUS_S))
    assert_works(tier)
    num_before = _num_sockets()
    server.freeze()
    threads = [in_background(tier, "read")[0] for _ in range(3)]
    while _num_sockets() < num_before + 2:  # one of the three takes the one that is there
        time.sleep(0.01)
    server.thaw()
    for thread in threads:
        thread.join(GENEROUS_S)
    assert _num_clients(server) == 3

    monkeypatch.setattr("kvkeep.tiers.valkey.IDLE_S", 0.0)
    assert_works(tier)

    assert _num_clients(server) == 1
    tier.close()


def _num_sockets() -> int:
    num_sockets = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            num_sockets += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return num_sockets


def _num_clients(server: ValkeyServer) -> int:
    """Connections over TCP, as the server counts them."""
    return server.command("CLIENT", "LIST").count(b"laddr=127.0.0.1:")
