"""Ports: those that servers of tests get, those a stack holds, and who listens on which address."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.model.errors import UnavailableError
from kvkeep.stack.servers.ports import HeldPorts
from kvkeep.testing.tier_contract import block_key
from kvkeep.tiers.mooncake import lanes
from kvkeep.tiers.mooncake.listening import ADDRESS_VARIABLE, find_library
from kvkeep.tiers.mooncake.settings import MooncakeSettings
from kvkeep.tiers.mooncake.tier import MooncakeTier
from tests.integration.daemons import Worker, running_daemon, wait_until
from tests.servers.hosts import three_hosts
from tests.servers.listening import children_of, listening_addresses
from tests.servers.mooncake import MIB, MooncakeStore, mooncake_store, open_tier
from tests.servers.processes import PORTS, SHARE, START_TIMEOUT_S, free_port

HERE = "127.0.0.1"


def test_a_port_is_nobodys_between_its_choice_and_its_use() -> None:
    """No connection is given it by the kernel, and no other server of this process."""
    first, _ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    ports = [free_port() for _ in range(SHARE // 2)]

    assert len(set(ports)) == len(ports)
    assert max(ports) < int(first)
    assert set(ports) <= set(PORTS)


def test_a_port_in_use_is_passed_over() -> None:
    """Whoever has it."""
    following = free_port() + 1
    with socket.create_server((HERE, following)):
        assert free_port() != following


# --- Ports that a stack holds ---------------------------------------------------------------------


@pytest.fixture
def held() -> Iterator[HeldPorts]:
    """Ports of one stack."""
    ports = HeldPorts()
    yield ports
    ports.let_all_go()


def test_a_held_port_is_its_servers_alone(held: HeldPorts) -> None:
    """Who binds without SO_REUSEADDR is refused; the server, which sets it, listens and answers."""
    port = held.take()
    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind((HERE, port))

    with (
        socket.create_server((HERE, port)),  # sets SO_REUSEADDR
        socket.create_connection((HERE, port), 5.0) as connection,
    ):
        assert connection.getpeername() == (HERE, port)


def test_ports_in_a_row_are_held_each(held: HeldPorts) -> None:
    """Another stack that looks for a row gets none of them, and their servers can listen."""
    other = HeldPorts()
    first = held.take(3)
    others = [other.take(2) for _ in range(20)]
    other.let_all_go()

    assert not {first, first + 1, first + 2} & {port + i for port in others for i in range(2)}
    for port in range(first, first + 3):
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind((HERE, port))
        socket.create_server((HERE, port)).close()


def test_a_port_that_was_let_go_is_anybodys(held: HeldPorts) -> None:
    """Programs that set no SO_REUSEADDR can be started too."""
    port = held.take()
    held.let_go(port)

    with socket.socket() as server:
        server.bind((HERE, port))


@pytest.mark.root
def test_no_two_stacks_are_given_one_port() -> None:
    """With four ports in the whole network, four are given once each, whoever asks how."""
    four = range(40_000, 40_004)
    with three_hosts() as (host, _, _), host.entered():
        limit = f"echo {four[0]} {four[-1]} > /proc/sys/net/ipv4/ip_local_port_range"
        subprocess.run([*host.within, "sh", "-c", limit], check=True)
        one, other = HeldPorts(others=[four[0]]), HeldPorts()
        taken = [one.take(), other.take(), one.take(), other.take()]
        with pytest.raises(OSError, match="in use"):
            socket.create_server((HERE, 0))
        with pytest.raises(UnavailableError, match=f"no TCP port of {HERE} is free"):
            one.take()
        one.let_all_go()
        other.let_all_go()

    assert sorted(taken) == list(four)
    assert four[0] not in (taken[0], taken[2])


# --- Where Mooncake's client listens --------------------------------------------------------------


@pytest.fixture(scope="module")
def store() -> Iterator[MooncakeStore]:
    """A master without storage."""
    with mooncake_store(0) as running:
        yield running


def test_a_daemon_with_mooncake_listens_on_loopback_alone(
    store: MooncakeStore, tmp_path: Path
) -> None:
    """Its own ports, those of its client of Mooncake Store, and those of what it lends there."""
    tier = {"kind": "mooncake", "master": store.address, "segment_bytes": 16 * MIB}
    config = tmp_path / "daemon.yaml"
    config.write_text(json.dumps({"tiers": [tier]}))
    with running_daemon(config=config) as daemon, Worker(daemon):
        wait_until(lambda: num_ports_of_children(daemon.pid) == [2, 2], "clients", START_TIMEOUT_S)
        pids = [daemon.pid, *children_of(daemon.pid)]
        found = {address for pid in pids for address in listening_addresses(pid)}

    assert found == {HERE}


def num_ports_of_children(pid: int) -> list[int]:
    """On how many ports each child of a process listens."""
    return [len(listening_addresses(child)) for child in children_of(pid)]


def test_mooncakes_client_listens_wider_if_told(store: MooncakeStore) -> None:
    """What peers see may be no address of this host."""
    tier = open_tier(store, listen_address="0.0.0.0")
    (client,) = tier.pids()
    found = set(listening_addresses(client))
    tier.close()

    assert "0.0.0.0" in found


@pytest.mark.parametrize(
    ("is_preloaded", "settings", "sentence"),
    [
        (False, {}, "would listen on every address of this host, not on 127.0.0.1 alone"),
        (True, {"local_hostname": "192.0.2.77"}, r"can't listen on 192\.0\.2\.77 .*listen_address"),
    ],
)
def test_a_client_that_can_not_be_kept_to_its_address_is_none(
    store: MooncakeStore,
    monkeypatch: pytest.MonkeyPatch,
    is_preloaded: bool,
    settings: dict[str, str],
    sentence: str,
) -> None:
    """Rather than on every address it listens on none, and the tier says why."""
    if not is_preloaded:
        monkeypatch.setattr(lanes, "listening_environment", lambda _address: {})
    tier = MooncakeTier(MooncakeSettings(master=store.address, **settings))  # type: ignore[arg-type]

    try:
        wait_until(lambda: "starting" not in why_away(tier), "it was tried", START_TIMEOUT_S)
        assert re.search(sentence, why_away(tier))
        assert tier.pids() == []
    finally:
        tier.close()


def why_away(tier: MooncakeTier) -> str:
    """What a caller is told; empty where it is served."""
    try:
        tier.lookup([block_key(1)])
    except UnavailableError as error:
        return str(error)
    return ""


PROBE = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.socket(family) as probe:
    if family == socket.AF_INET6:
        probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    if sys.argv[1] != ":unbound":
        probe.bind((sys.argv[1], 0))
    try:
        probe.listen()
        print(probe.getsockname()[0])
    except OSError as error:
        print(error.strerror)
"""


@pytest.mark.parametrize(
    ("allowed", "asked", "found"),
    [
        (HERE, "0.0.0.0", HERE),
        (HERE, "::", f"::ffff:{HERE}"),
        (HERE, "::ffff:0.0.0.0", f"::ffff:{HERE}"),
        (HERE, ":unbound", f"::ffff:{HERE}"),
        ("127.0.0.2", "0.0.0.0", "127.0.0.2"),
        ("127.0.0.2", "127.0.0.3", "127.0.0.3"),
        ("::1", "0.0.0.0", HERE),
    ],
)
def test_what_is_preloaded_narrows_every_address(allowed: str, asked: str, found: str) -> None:
    """To the one that was said, in the family of the socket; other addresses stay."""
    assert listens_on(allowed, asked) == found


@pytest.mark.parametrize("allowed", ["", "localhost", "127.0.0.1 "])
def test_without_an_address_nothing_listens(allowed: str) -> None:
    """A name, or none, is nothing to listen on."""
    assert "assign requested address" in listens_on(allowed, ":unbound")


def listens_on(allowed: str, asked: str) -> str:
    """Address of a socket that a process with the preloaded library listens on, or why not."""
    environment = os.environ | {"LD_PRELOAD": str(find_library()), ADDRESS_VARIABLE: allowed}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, asked],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()
