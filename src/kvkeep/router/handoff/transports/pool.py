"""kvkeep's own transport: the prefill engine stores, the decode engine finds.

Blocks lie in the daemon's pool by what they hold, not by whose they are: any number of decode
engines may load them, and what is not loaded is evicted in its turn like anything else.
"""

import math
from typing import Final

from kvkeep.router.handoff.splice import JsonObject, SpliceError

PREFILL_PARAMS: Final = b'{"kvkeep":{"hand_off":"prefill"}}'


class PoolTransport:
    """Tickets that a prefill engine's connector gives out, and a decode engine's one waits for."""

    name = "pool"
    is_reusable = True
    lease_s = math.inf

    def prefill_params(self) -> bytes:
        """Have every full block of the prompt stored."""
        return PREFILL_PARAMS

    def is_empty(self, offer: bytes) -> bool:
        """Whether the prompt has no full block."""
        ticket = _ticket(offer)
        return ticket is not None and ticket.find("tokens") == b"0"

    def decode_params(self, offer: bytes) -> bytes | None:
        """The ticket, with what to do about it."""
        ticket = _ticket(offer)
        if ticket is None or ticket.find("ticket") is None:
            return None
        return b'{"kvkeep":%b}' % ticket.edited({"hand_off": b'"decode"'})

    def release_body(self, offer: bytes) -> bytes | None:
        """Blocks in the pool are held for nobody."""
        return None


def _ticket(offer: bytes) -> JsonObject | None:
    try:
        own = JsonObject(offer).find("kvkeep")
        return None if own is None else JsonObject(own)
    except SpliceError:
        return None
