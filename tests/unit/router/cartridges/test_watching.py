"""What pages say, and where they are."""

import json

import pytest

from kvkeep.router.cartridges.watching import page_of, parse_page
from kvkeep.router.snapshot import Endpoint


def test_a_daemon_s_status_is_understood() -> None:
    """What lies in its pool is resident, whatever else the page says."""
    states = {"a": "loaded", "b": "in use", "c": "pinned", "d": "absent", "e": "news"}
    listed = [{"cartridge_id": name, "state": state, "blocks": 7} for name, state in states.items()]
    page = {"version": "1", "counters": {}, "cartridges": listed}

    assert parse_page(json.dumps(page).encode()) == frozenset("abc")


def test_an_empty_pool_says_that_it_has_none() -> None:
    """Which is another thing than not saying."""
    assert parse_page(b'{"cartridges": []}') == frozenset()


@pytest.mark.parametrize(
    "page",
    [b"", b"{}", b"[]", b'{"cartridges": {}}', b'{"cartridges": ["a"]}', b'{"cartridges": [{}]}',
     b'{"cartridges": [{"cartridge_id": 7, "state": "loaded"}]}', b"[" * 100_000],
)  # fmt: skip
def test_another_page_says_nothing(page: bytes) -> None:
    """Of an older daemon, or of something else altogether."""
    assert parse_page(page) is None


def test_where_a_page_is() -> None:
    """Beside the engine, whatever kind of address it has."""
    template = "http://{host}:9400/status?engine={port}"

    assert page_of(template, Endpoint("a", "10.0.0.1", 8000)) == (
        "http://10.0.0.1:9400/status?engine=8000"
    )
    assert page_of(template, Endpoint("a", "::1", 8000)).startswith("http://[::1]:9400/")
