"""Which daemon a client asks, before it asks."""

import numpy as np
import pytest

from kvkeep.client.sequences import Locality, SequenceClient
from kvkeep.core.ring import Ring, spot_of
from kvkeep.model.errors import InputError
from kvkeep.router.policies import ring as router_ring
from kvkeep.router.snapshot import Endpoint

URLS = {"a": "http://127.0.0.1:7001", "b": "http://127.0.0.1:7002", "c": "http://[::1]:7003"}
NAMES = [f"chat-{number}" for number in range(2000)]


def test_every_client_names_the_same_owner() -> None:
    """In whatever order it was told of the daemons, and wherever they are by now."""
    one = SequenceClient(URLS)
    other = SequenceClient(dict.fromkeys(reversed(URLS), "http://127.0.0.1:9"))

    assert [one.owner(name) for name in NAMES] == [other.owner(name) for name in NAMES]
    assert {one.owner(name) for name in NAMES} == set(URLS)


def test_the_owner_is_the_one_that_the_router_names() -> None:
    """For one ring serves both, and a daemon beside each engine may bear its name."""
    client = SequenceClient(URLS)
    ring = router_ring.Ring([Endpoint(name, "127.0.0.1", 1) for name in ("c", "a", "b")])

    assert [client.owner(name) for name in NAMES] == [
        ring.home(router_ring.spot_of(name.encode())).name for name in NAMES
    ]


def test_a_daemon_without_a_name_is_its_address() -> None:
    """As the router calls an engine."""
    client = SequenceClient(list(URLS.values()))
    ring = Ring((name, 1.0, name) for name in ("127.0.0.1:7001", "127.0.0.1:7002", "[::1]:7003"))

    assert [client.owner(name) for name in NAMES] == [
        ring.home(spot_of(name.encode())) for name in NAMES
    ]


@pytest.mark.parametrize(
    "daemons",
    [
        [],
        {},
        ["127.0.0.1:7001"],
        ["https://127.0.0.1:7001"],
        ["http://127.0.0.1:port"],
        ["http://127.0.0.1:7001/there"],
        ["http://127.0.0.1:7001", "http://127.0.0.1:7001"],
    ],
)
def test_what_is_no_address_is_refused(daemons: list[str]) -> None:
    """Before anything is asked."""
    with pytest.raises(InputError):
        SequenceClient(daemons)


@pytest.mark.parametrize("name", ["", "../etc", "a b", "x" * 300])
def test_what_is_no_name_is_refused(name: str) -> None:
    """Before anything is asked."""
    with pytest.raises(InputError, match="sequence's name"):
        SequenceClient(URLS).get(name)


def test_a_sequence_without_layers_is_refused() -> None:
    """And one of a layer that can't be."""
    client, array = SequenceClient(URLS), np.zeros((1, 1, 1), np.float32)
    with pytest.raises(InputError, match="needs a layer"):
        client.put("a", {})
    with pytest.raises(InputError, match="layer -1"):
        client.append("a", {-1: (array, array)})


def test_a_share_of_nothing_is_one() -> None:
    """Nothing was looked for in the wrong place."""
    assert Locality().share == 1.0
    assert Locality(5, 4, 3).share == 0.75


def test_a_key_on_two_lines_is_refused() -> None:
    """It would be another line of the request."""
    with pytest.raises(InputError, match="one line"):
        SequenceClient(URLS, key="key\r\nX-Other: 1")
