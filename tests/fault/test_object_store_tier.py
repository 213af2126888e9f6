"""What an object store tier's caller sees when the server or the way to it fails."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvkeep.model.errors import UnavailableError
from kvkeep.testing.tcp_proxy import FaultyRelay, NetworkFault, Towards
from kvkeep.testing.tier_contract import VALUE_BYTES, block_key, read, value_bytes, write
from kvkeep.tiers.entry_names import HEAD_BYTES, entry_name
from kvkeep.tiers.object_store import ObjectStoreTier
from tests.integration.daemons import wait_until
from tests.servers.seaweed import SeaweedServer

TIMEOUT_S = 1.5
"""Of the tests in which it passes."""
GENEROUS_S = 60.0
"""Of the others, which must not end for want of time on a busy machine."""
MID_BATCH_BYTES = 2 * VALUE_BYTES + VALUE_BYTES // 2
NUMBERS = range(8)
KEYS = [block_key(number) for number in NUMBERS]


@pytest.fixture(scope="module")
def server() -> Iterator[SeaweedServer]:
    server = SeaweedServer().run()
    yield server
    server.stop()


@pytest.fixture
def relay(server: SeaweedServer) -> Iterator[FaultyRelay]:
    """The way to the server."""
    with FaultyRelay(("127.0.0.1", server.port), seed=7) as relay:
        yield relay


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """A prefix that no other test has."""
    return "".join(char for char in request.node.name if char.isalnum()) + "/"


@contextlib.contextmanager
def opened(
    server: SeaweedServer, relay: FaultyRelay, timeout_s: float, prefix: str = "kvkeep/"
) -> Iterator[ObjectStoreTier]:
    """A tier behind the relay."""
    # The name of the host is signed, so the server has to be called as it calls itself.
    endpoint = f"http://127.0.0.1:{relay.address[1]}"
    settings = server.settings(endpoint=endpoint, timeout_s=timeout_s, prefix=prefix, num_threads=2)
    tier = ObjectStoreTier(settings)
    try:
        yield tier
    finally:
        relay.heal()
        tier.close()


@pytest.fixture
def tier(server: SeaweedServer, relay: FaultyRelay, prefix: str) -> Iterator[ObjectStoreTier]:
    with opened(server, relay, GENEROUS_S, prefix) as tier:
        yield tier


@pytest.fixture
def hasty(server: SeaweedServer, relay: FaultyRelay, prefix: str) -> Iterator[ObjectStoreTier]:
    """The same values, and little time."""
    with opened(server, relay, TIMEOUT_S, prefix) as tier:
        yield tier


def in_background(tier: ObjectStoreTier, verb: str) -> tuple[threading.Thread, list[BaseException]]:
    """Write or read a batch in a thread; returns it, and the errors it will have met."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            if verb == "write":
                write(tier, NUMBERS)
            else:
                read(tier, KEYS)
        except UnavailableError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, errors


def assert_works(tier: ObjectStoreTier) -> None:
    """What is written now is read."""
    assert write(tier, [20]) == [True]
    assert read(tier, [block_key(20)]) == [value_bytes(20)]


def works(tier: ObjectStoreTier) -> bool:
    """The same of a tier whose calls have little time, and may be too late on a busy machine."""
    with contextlib.suppress(UnavailableError):
        assert_works(tier)
        return True
    return False


@pytest.mark.parametrize("verb", ["write", "read", "read one", "lookup", "keys", "delete"])
def test_a_frozen_server(
    tier: ObjectStoreTier, hasty: ObjectStoreTier, server: SeaweedServer, verb: str
) -> None:
    """Every call ends within its time limit, and works when the server goes on."""
    calls: dict[str, Callable[[], object]] = {
        "write": lambda: write(hasty, NUMBERS),
        "read": lambda: read(hasty, KEYS),
        "read one": lambda: read(hasty, KEYS[:1]),
        "lookup": lambda: hasty.lookup(KEYS),
        "keys": lambda: list(hasty.keys()),
        "delete": lambda: hasty.delete(KEYS),
    }
    write(tier, [1])
    server.freeze()
    begun_s = time.perf_counter()
    try:
        with pytest.raises(UnavailableError, match=r"within 1\.5 s"):
            calls[verb]()
        took_s = time.perf_counter() - begun_s
    finally:
        server.thaw()

    assert TIMEOUT_S * 0.7 <= took_s < GENEROUS_S
    wait_until(lambda: works(hasty), "it works")


@pytest.mark.parametrize("after_bytes", [0, 50, 100_000, MID_BATCH_BYTES])
def test_a_network_cut_in_mid_value(
    tier: ObjectStoreTier, relay: FaultyRelay, after_bytes: int
) -> None:
    """In an answer's first line or in a value: an error, and no half value."""
    write(tier, NUMBERS)
    relay.strike(NetworkFault.CUT, after_bytes=after_bytes)
    with pytest.raises(UnavailableError, match="can't be reached, or hung up"):
        read(tier, KEYS)
    relay.heal()

    assert read(tier, [block_key(3)]) == [value_bytes(3)]
    assert_works(tier)


def test_a_cut_write_is_whole_or_absent(tier: ObjectStoreTier, relay: FaultyRelay) -> None:
    """What the server has of a batch that broke off is read whole, and the rest is a miss."""
    relay.strike(NetworkFault.CUT, towards=Towards.SERVER, after_bytes=MID_BATCH_BYTES)
    with pytest.raises(UnavailableError):
        write(tier, NUMBERS)
    relay.heal()

    found = read(tier, KEYS)

    assert all(
        value in (None, value_bytes(number)) for number, value in zip(NUMBERS, found, strict=True)
    )
    assert None in found


def test_a_trickling_network(
    tier: ObjectStoreTier, hasty: ObjectStoreTier, relay: FaultyRelay
) -> None:
    """Bytes that keep coming do not stretch the limit."""
    write(tier, range(2))
    # At this rate two values take ten times as long as a call that must end may.
    relay.strike(NetworkFault.SLOW, bytes_per_s=2 * VALUE_BYTES / (10 * GENEROUS_S))
    begun_s = time.perf_counter()
    with pytest.raises(UnavailableError, match="within"):
        read(hasty, KEYS[:2])

    assert time.perf_counter() - begun_s < GENEROUS_S


def test_refused_connections(tier: ObjectStoreTier, relay: FaultyRelay) -> None:
    """An error soon, and recovery by itself."""
    relay.strike(NetworkFault.REFUSED)
    with pytest.raises(UnavailableError, match="can't be reached"):
        read(tier, KEYS)
    relay.heal()

    assert_works(tier)


def test_a_truncated_object_is_a_miss(
    tier: ObjectStoreTier, server: SeaweedServer, prefix: str
) -> None:
    """So is one that has grown, and one cut inside its head; their neighbours are hits."""
    write(tier, range(5))
    store = server.store()
    names = [entry_name(key, prefix) for key in KEYS]
    for number, length in ((1, HEAD_BYTES + 1000), (2, 10), (3, 0)):
        store.put(names[number], bytes(store.get(names[number]).bytes())[:length])
    store.put(names[4], bytes(store.get(names[4]).bytes()) + b"!")

    found = read(tier, KEYS[:5], VALUE_BYTES + 10)

    assert found == [value_bytes(0), None, None, None, None]


def test_a_foreign_object_is_a_miss(
    tier: ObjectStoreTier, server: SeaweedServer, prefix: str
) -> None:
    """A stranger's bytes and another block's object under our key; then ours again."""
    write(tier, range(3))
    store = server.store()
    names = [entry_name(key, prefix) for key in KEYS]
    store.put(names[0], b"x" * (VALUE_BYTES + HEAD_BYTES))
    store.copy(names[2], names[1])

    assert read(tier, KEYS[:3]) == [None, None, value_bytes(2)]
    assert write(tier, range(2)) == [True] * 2
    assert read(tier, KEYS[:2]) == [value_bytes(0), value_bytes(1)]


@pytest.fixture
def mortal_server() -> Iterator[SeaweedServer]:
    """A server that its test may kill."""
    server = SeaweedServer().run()
    yield server
    server.stop()


@pytest.mark.parametrize("is_kept", [True, False], ids=["disk kept", "disk lost"])
def test_a_server_killed_in_mid_batch(mortal_server: SeaweedServer, is_kept: bool) -> None:
    """The batch is an error. Started again, it has what it had, or misses all, and works."""
    target = ("127.0.0.1", mortal_server.port)
    with FaultyRelay(target) as relay, contextlib.ExitStack() as ends:
        hasty = ends.enter_context(opened(mortal_server, relay, 2 * TIMEOUT_S))
        tier = ends.enter_context(opened(mortal_server, relay, GENEROUS_S))
        write(tier, NUMBERS)
        verb, towards = ("write", Towards.SERVER) if is_kept else ("read", Towards.CLIENT)
        reached = relay.strike(NetworkFault.FROZEN, towards=towards, after_bytes=MID_BATCH_BYTES)
        thread, errors = in_background(hasty, verb)
        assert reached.wait(GENEROUS_S)
        mortal_server.kill()
        thread.join(GENEROUS_S)
        relay.heal()
        if not is_kept:
            mortal_server.clear()
        mortal_server.run()

        assert [type(error) for error in errors] == [UnavailableError]
        expected = [value_bytes(number) if is_kept else None for number in NUMBERS]
        assert read(tier, KEYS) == expected
        wait_until(lambda: works(hasty), "it works")
