"""What the two transports tell engines."""

import json
import math

import pytest

from kvkeep.router.handoff.settings import HandOffSettings
from kvkeep.router.handoff.splice import JsonObject
from kvkeep.router.handoff.transports.nixl import NixlTransport
from kvkeep.router.handoff.transports.pool import PoolTransport

OFFER = b'{"do_remote_prefill":true, "remote_block_ids":[[1]]}'
TICKET = b'{"kvkeep": {"tokens": 32, "ticket":"ab"}, "other": 1}'


def test_nixl_passes_offers_on_as_they_are() -> None:
    """Byte by byte; what offers nothing is none."""
    nixl = NixlTransport(30.0)

    assert nixl.decode_params(OFFER) is OFFER
    assert nixl.decode_params(b"{}") is None
    assert nixl.decode_params(b"null") is None
    assert nixl.decode_params(b'{"do_remote_prefill":false}') is None
    assert not nixl.is_empty(OFFER)


def test_nixl_releases_by_a_request_that_is_refused() -> None:
    """It names no model that there could be, and carries the offer."""
    body = json.loads(NixlTransport(30.0).release_body(OFFER))

    assert body["model"] == "kvkeep-release-offer"
    assert body["kv_transfer_params"] == json.loads(OFFER)


def test_the_pool_passes_tickets_on() -> None:
    """Only kvkeep's own part, with the role of who gets it."""
    pool = PoolTransport()

    assert pool.decode_params(TICKET) == (
        b'{"kvkeep":{"tokens": 32, "ticket":"ab","hand_off":"decode"}}'
    )
    assert pool.decode_params(b"{}") is None
    assert pool.decode_params(b'{"kvkeep":{}}') is None
    assert pool.decode_params(b'{"kvkeep":1}') is None
    assert pool.release_body(TICKET) is None


@pytest.mark.parametrize(
    ("offer", "is_empty"),
    [(TICKET, False), (b'{"kvkeep":{"ticket":"","tokens":0}}', True), (b"{}", False)],
)
def test_the_pool_knows_a_prompt_without_blocks(offer: bytes, is_empty: bool) -> None:
    """Its ticket says that nothing is handed over; no ticket says nothing."""
    assert PoolTransport().is_empty(offer) == is_empty


def test_params_are_json() -> None:
    """Whatever is spliced in is one object."""
    for transport in (PoolTransport(), NixlTransport(5.0)):
        assert JsonObject(transport.prefill_params()).members
    assert (PoolTransport().lease_s, NixlTransport(5.0).lease_s) == (math.inf, 5.0)


def test_a_margin_must_fit_into_the_lease() -> None:
    """Else no offer could ever be fetched."""
    with pytest.raises(ValueError, match="offer_margin_s"):
        HandOffSettings(offer_lease_s=5.0, offer_margin_s=5.0)
