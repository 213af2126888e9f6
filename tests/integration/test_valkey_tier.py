"""The Valkey tier against real servers: the contract, passwords, TLS, limits of memory."""

import itertools
from collections.abc import Callable, Iterator

import pytest

from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.testing.tier_contract import (
    NUM_VALUES,
    VALUE_BYTES,
    TierContract,
    block_key,
    in_parts,
    read,
    value_bytes,
    write,
)
from kvkeep.tiers.base import Tier
from kvkeep.tiers.entry_names import HEAD_BYTES, entry_name
from kvkeep.tiers.valkey import AHEAD_BYTES, ValkeySettings, ValkeyTier
from tests.servers.heads import HEAD_DAMAGES, stored
from tests.servers.processes import free_port
from tests.servers.tls import TlsDoor
from tests.servers.valkey import ValkeyServer

SECRET = "correct horse"
_prefixes = (f"test-{number}/" for number in itertools.count())


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    """A server without a password, and with a user who may work below one prefix only."""
    server = ValkeyServer().run()
    server.command(
        *("ACL", "SETUSER", "worker", "on", f">{SECRET}", "~mine/*"),
        *("+get", "+set", "+unlink", "+strlen", "+scan", "+select"),
    )
    yield server
    server.stop()


@pytest.fixture
def prefix() -> str:
    """A prefix that no other test has."""
    return next(_prefixes)


@pytest.fixture
def tier(server: ValkeyServer, prefix: str) -> Iterator[ValkeyTier]:
    tier = ValkeyTier(ValkeySettings(url=server.url, prefix=prefix, timeout_s=60.0))
    yield tier
    tier.close()


class TestValkeyTier(TierContract):
    @pytest.fixture
    def tier(self, server: ValkeyServer, prefix: str) -> Iterator[Tier]:
        tier = ValkeyTier(ValkeySettings(url=server.url, prefix=prefix, timeout_s=60.0))
        yield tier
        tier.close()


class TestValkeyTierOnUnixSocket(TierContract):
    @pytest.fixture
    def tier(self, server: ValkeyServer, prefix: str) -> Iterator[Tier]:
        tier = ValkeyTier(
            ValkeySettings(url=f"unix://{server.unix_path}", prefix=prefix, timeout_s=60.0)
        )
        yield tier
        tier.close()


@pytest.fixture(scope="module")
def door(server: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsDoor]:
    """The server behind TLS."""
    door = TlsDoor(("127.0.0.1", server.port), tmp_path_factory.mktemp("tls"))
    yield door
    door.close()


class TestValkeyTierOverTls(TierContract):
    @pytest.fixture
    def tier(self, door: TlsDoor, prefix: str) -> Iterator[Tier]:
        url = f"valkeys://127.0.0.1:{door.port}"
        tier = ValkeyTier(
            ValkeySettings(url=url, ca_file=door.ca_file, prefix=prefix, timeout_s=60.0)
        )
        yield tier
        tier.close()


def test_an_unknown_certificate_is_refused(door: TlsDoor) -> None:
    """Whoever is not vouched for gets no block, and the message says where to mend it."""
    tier = ValkeyTier(ValkeySettings(url=f"rediss://127.0.0.1:{door.port}"))

    with pytest.raises(UnavailableError, match=r"can't be trusted.*ca_file"):
        write(tier, [1])

    tier.close()


def test_a_server_without_tls_is_told_so(server: ValkeyServer) -> None:
    """Instead of waiting for a handshake that never ends."""
    url = f"valkeys://127.0.0.1:{server.port}"
    tier = ValkeyTier(ValkeySettings(url=url, timeout_s=1.0))

    with pytest.raises(UnavailableError, match="see"):
        write(tier, [1])

    tier.close()


def test_a_block_is_one_string(tier: ValkeyTier, server: ValkeyServer, prefix: str) -> None:
    """Head and bytes are written at once: nobody ever sees a part."""
    write(tier, [1])

    length = server.command("STRLEN", entry_name(block_key(1), prefix))

    assert length == b":%d\r\n" % (HEAD_BYTES + VALUE_BYTES)


@pytest.mark.parametrize("damage", HEAD_DAMAGES, ids=lambda damage: damage.__name__)
def test_a_value_with_a_damaged_head_is_dropped_and_counted(
    tier: ValkeyTier, server: ValkeyServer, prefix: str, damage: Callable[[bytes], bytes]
) -> None:
    """It is gone after the first read, and its neighbor is served."""
    write(tier, [1, 2])
    name = entry_name(block_key(1), prefix)
    server.command("SET", name, damage(stored(1, prefix)))

    assert read(tier, [block_key(1), block_key(2)]) == [None, value_bytes(2)]
    assert server.command("EXISTS", name) == b":0\r\n"
    assert tier.num_rotten == 1
    assert read(tier, [block_key(1)]) == [None]
    assert tier.num_rotten == 1
    assert write(tier, [1]) == [True]
    assert read(tier, [block_key(1)]) == [value_bytes(1)]


def test_what_is_whole_or_not_ours_is_not_dropped(
    tier: ValkeyTier, server: ValkeyServer, prefix: str
) -> None:
    """A value longer than the room is no rot, nor is what is no string."""
    write(tier, [1])
    other = entry_name(block_key(2), prefix)
    server.command("LPUSH", other, "x")

    assert read(tier, [block_key(1), block_key(2)], VALUE_BYTES - 1) == [None, None]
    assert tier.num_rotten == 0
    assert read(tier, [block_key(1)]) == [value_bytes(1)]
    assert server.command("EXISTS", other) == b":1\r\n"


def test_a_batch_beyond_what_is_sent_ahead(tier: ValkeyTier) -> None:
    """Many values and large ones come through whole and in order."""
    value_bytes_each = AHEAD_BYTES // 4 + 1
    assert write(tier, range(9), value_bytes_each) == [True] * 9

    found = read(tier, [block_key(number) for number in range(9)], value_bytes_each)

    assert found == [value_bytes(number, value_bytes_each) for number in range(9)]


def test_deployments_share_a_server(tier: ValkeyTier, server: ValkeyServer) -> None:
    """Another prefix sees, lists and deletes nothing of ours, nor does a stranger's key harm."""
    server.command("SET", next(_prefixes) + "something", "else")
    other = ValkeyTier(ValkeySettings(url=server.url, prefix=next(_prefixes)))
    write(tier, [1])
    other.delete([block_key(1)])

    assert (list(other.keys()), other.lookup([block_key(1)])) == ([], [False])
    assert read(other, [block_key(1)]) == [None]
    assert list(tier.keys()) == [block_key(1)]

    other.close()


def test_databases_are_apart(server: ValkeyServer) -> None:
    """The number in the address chooses the server's database."""
    tiers = [ValkeyTier(ValkeySettings(url=f"{server.url}/{number}")) for number in (3, 4)]
    write(tiers[0], [1])

    assert [tier.lookup([block_key(1)]) for tier in tiers] == [[True], [False]]

    for tier in tiers:
        tier.close()


def test_a_life_time_is_the_servers(server: ValkeyServer, prefix: str) -> None:
    """With ``ttl_s`` the server forgets by itself."""
    tier = ValkeyTier(ValkeySettings(url=server.url, prefix=prefix, ttl_s=1000))
    write(tier, [1])
    left_ms = int(server.command("PTTL", entry_name(block_key(1), prefix))[1:])

    assert 900_000 < left_ms <= 1_000_000

    tier.close()


def test_a_user_with_a_password(server: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the environment; who may do so much only is told what is missing."""
    monkeypatch.setenv("VALKEY_USER", "worker")
    monkeypatch.setenv("VALKEY_PASSWORD", SECRET)
    tier = ValkeyTier(ValkeySettings(url=server.url, prefix="mine/"))
    stranger = ValkeyTier(ValkeySettings(url=server.url, prefix="theirs/"))

    assert write(tier, [1]) == [True]
    assert list(tier.keys()) == [block_key(1)]
    tier.delete([block_key(1)])
    with pytest.raises(UnavailableError, match="does not let this user work"):
        read(stranger, [block_key(1)])

    tier.close()
    stranger.close()


def test_a_wrong_password_is_one_sentence(server: ValkeyServer) -> None:
    """It says what to set and never what was set."""
    settings = ValkeySettings(url=server.url.replace("//", "//worker:hunter2@"))
    tier = ValkeyTier(settings)

    with pytest.raises(UnavailableError, match="mend VALKEY_USER and VALKEY_PASSWORD") as caught:
        tier.lookup([block_key(1)])

    assert "hunter2" not in f"{caught.value} {settings!r} {tier!r}"
    tier.close()


def test_a_missing_password_is_one_sentence() -> None:
    """A server that wants one is told from a server that is away."""
    server = ValkeyServer("--requirepass", SECRET).run()
    tier = ValkeyTier(ValkeySettings(url=server.url))
    knowing = ValkeyTier(ValkeySettings(url=server.url, password=SECRET))
    try:
        with pytest.raises(UnavailableError, match="set VALKEY_PASSWORD"):
            read(tier, [block_key(1)])
        assert write(knowing, [1]) == [True]
    finally:
        tier.close()
        knowing.close()
        server.stop()


def test_a_full_server_declines() -> None:
    """Without a policy to make room, what was kept stays and the rest is declined."""
    server = ValkeyServer("--maxmemory", "6mb", "--maxmemory-policy", "noeviction").run()
    tier = ValkeyTier(ValkeySettings(url=server.url))
    try:
        kept = write(tier, range(NUM_VALUES))
        found = read(tier, [block_key(number) for number in range(NUM_VALUES)])

        assert kept[0]
        assert not all(kept)
        assert [value is not None for value in found] == kept
        tier.delete([block_key(number) for number in range(NUM_VALUES)])
        assert write(tier, [1]) == [True]
    finally:
        tier.close()
        server.stop()


def test_a_replica_says_so() -> None:
    """A server that takes no writes is told from one that is full."""
    server = ValkeyServer("--replicaof", f"127.0.0.1 {free_port()}").run()
    tier = ValkeyTier(ValkeySettings(url=server.url))
    try:
        with pytest.raises(UnavailableError, match="is a replica"):
            write(tier, [1])
    finally:
        tier.close()
        server.stop()


def test_nobody_there_is_one_sentence() -> None:
    """The address and what to look at; quickly."""
    port = free_port()
    tier = ValkeyTier(ValkeySettings(url=f"valkey://127.0.0.1:{port}"))

    with pytest.raises(
        UnavailableError, match=f"127.0.0.1:{port} can't be reached.*whether it runs"
    ):
        tier.write([block_key(1)], [in_parts(b"x")])

    tier.close()


def test_settings_that_can_not_be_are_refused() -> None:
    """Before anything is started, naming the setting."""
    for wrong in ({"url": "http://host"}, {"prefix": "*"}, {"timeout_s": 0}, {"ttl_s": -1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            ValkeyTier(ValkeySettings(**wrong))
