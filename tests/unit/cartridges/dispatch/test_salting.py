"""Salts that keep cartridges apart in an engine's own prefix cache."""

import pytest

from kvkeep.cartridges.dispatch.salting import client_part, salted
from kvkeep.model.errors import InputError


def test_a_cartridge_s_requests_share_a_salt() -> None:
    """They may reuse each other's blocks, and nobody else may."""
    assert salted("d1") == salted("d1", "") == "kvkeep-cartridge:d1"
    assert salted("d1") != salted("d2")


def test_a_request_s_own_salt_still_keeps_it_apart() -> None:
    """Two tenants with one cartridge share nothing that they did not share before."""
    assert salted("d1", "alice") == "kvkeep-cartridge:d1:alice"
    assert salted("d1", "alice") != salted("d1", "bob")


def test_a_salt_that_says_so_already_stays() -> None:
    """Behind a second router, and in an engine behind a router, it is the same salt."""
    for own in (None, "alice"):
        once = salted("d1", own)
        assert salted("d1", once) == once


def test_the_salt_of_another_cartridge_is_refused() -> None:
    """Nobody gets at a cartridge's blocks by its digest and another id."""
    for stolen in ("kvkeep-cartridge:d2", "kvkeep-cartridge:d1x", "kvkeep-cartridge:"):
        with pytest.raises(InputError, match="leave it out"):
            salted("d1", stolen)


def test_what_a_client_said_is_found_again() -> None:
    """In a salt that a router made, and in one that none did."""
    for own in (None, "alice", "alice:d1"):
        assert client_part("d1", salted("d1", own)) == own
        assert client_part("d1", own) == own
    assert client_part("d1", "") is None
