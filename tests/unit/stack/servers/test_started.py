"""Entries of tiers whose servers the stack starts."""

import pytest

from kvkeep.model.errors import InputError
from kvkeep.stack.precedence import make_spec
from kvkeep.stack.servers.started import (
    StartedServer,
    client_settings,
    find_started,
    with_ports,
)
from kvkeep.stack.spec import StackSpec

VALKEY: dict[str, object] = {"kind": "valkey", "start": True, "capacity_bytes": "1GiB"}
OBJECTS: dict[str, object] = {"kind": "object_store", "start": True, "capacity_bytes": "2GiB"}
MOONCAKE: dict[str, object] = {"kind": "mooncake", "start": True, "segment_bytes": 1 << 30}
DISK: dict[str, object] = {"kind": "disk", "folder": "x", "capacity_bytes": "1GiB"}


def spec_of(*tiers: dict[str, object]) -> StackSpec:
    values = {"name": "s", "daemon": {"tiers": list(tiers)}, "engines": [{"name": "a"}]}
    return make_spec(values, environment={})


def test_a_started_tier_has_the_address_of_its_port() -> None:
    """The daemon is told where the server will listen, and nothing of its start."""
    found = [client_settings(tier | {"port": 70}) for tier in (VALKEY, OBJECTS, MOONCAKE)]

    assert found == [
        {"kind": "valkey", "capacity_bytes": "1GiB", "url": "valkey://127.0.0.1:70/0"},
        {
            "kind": "object_store",
            "capacity_bytes": "2GiB",
            "url": "s3://kvkeep",
            "endpoint": "http://127.0.0.1:70",
        },
        {"kind": "mooncake", "segment_bytes": 1 << 30, "master": "127.0.0.1:70"},
    ]


def test_servers_are_found_in_the_order_of_their_tiers() -> None:
    """With their sizes in bytes; what has an address of its own is not among them."""
    assert list(find_started([DISK, VALKEY | {"port": 7}, MOONCAKE])) == [
        StartedServer("valkey", 7, 1 << 30, 1),
        StartedServer("mooncake", 0, 1 << 30, 2),
    ]


def test_ports_go_to_the_tiers_that_they_were_chosen_for() -> None:
    """A tier without a server stays as it was."""
    assert with_ports([DISK, VALKEY], {1: 70}) == [DISK, VALKEY | {"port": 70}]


def test_a_stack_with_started_servers_is_valid() -> None:
    """Its daemon's settings hold addresses, so they pass the daemon's own checks."""
    settings = spec_of(DISK, VALKEY, OBJECTS, MOONCAKE).daemon_settings()

    assert len(settings.tiers) == 4


def test_start_false_is_a_tier_like_any() -> None:
    """A file may say so to be turned on by a flag."""
    tier: dict[str, object] = {"kind": "valkey", "url": "valkey://127.0.0.1:1", "start": False}

    assert list(find_started(spec_of(tier).daemon.tiers)) == []


@pytest.mark.parametrize(
    ("tiers", "sentence"),
    [
        ([DISK | {"start": True}], "daemon.tiers[0].start: disk has no server to start"),
        ([VALKEY | {"start": "yes"}], "daemon.tiers[0].start = yes: write true or false."),
        ([VALKEY | {"url": "valkey://h"}], "daemon.tiers[0].url: leave it out"),
        ([VALKEY | {"port": 70000}], "daemon.tiers[0].port = 70000: write a TCP port"),
        ([VALKEY | {"port": True}], "daemon.tiers[0].port = True: write a TCP port"),
        ([DISK | {"port": 1}], "daemon.tiers[0].port: only a server that is started has one"),
        ([{"kind": "mooncake", "start": True}], "daemon.tiers[0].segment_bytes: it is missing"),
        ([DISK, VALKEY, VALKEY], "daemon.tiers[1].start: another tier is valkey too"),
        ([VALKEY | {"capacity_bytes": "much"}], "'much'"),
    ],
)
def test_a_wrong_entry_is_one_sentence(tiers: list[dict[str, object]], sentence: str) -> None:
    """It names the field and the mend."""
    with pytest.raises(InputError) as caught:
        spec_of(*tiers)

    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
