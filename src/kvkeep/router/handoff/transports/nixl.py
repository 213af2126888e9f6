"""vLLM's NixlConnector: the decode engine reads the prefill engine's memory.

A prefill engine keeps a finished request's blocks until a decode engine says that it has them, or
``kv_lease_duration`` has passed without a heartbeat (vllm 0.32, nixl/pull_scheduler.py). Blocks are
read by their numbers: whoever reads too late reads what others have put there since. So an offer is
sent to one decode engine only, and not shortly before its lease ends.

The answer's ``remote_blocks_expiry_time`` is no help: it is on the clock of the engine's host, and
only for blocks that a decode engine keeps.
"""

from typing import Final

from kvkeep.router.handoff.splice import JsonObject, SpliceError

PREFILL_PARAMS: Final = (
    b'{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,'
    b'"remote_block_ids":null,"remote_host":null,"remote_port":null}'
)
UNKNOWN_MODEL: Final = b"kvkeep-release-offer"
"""A decode engine that refuses a request tells the prefill engine that it won't fetch (vllm 0.32,
entrypoints/generate/base/serving.py); there is no other way to say so from outside."""


class NixlTransport:
    """Offers of stock vLLM, passed from one engine to the other as they are."""

    name = "nixl"
    is_reusable = False

    def __init__(self, lease_s: float) -> None:
        """Know how long the engines' leases last."""
        self.lease_s = lease_s

    def prefill_params(self) -> bytes:
        """As NixlConnector wants them."""
        return PREFILL_PARAMS

    def is_empty(self, offer: bytes) -> bool:
        """Never: the block of the last token is handed over too."""
        return False

    def decode_params(self, offer: bytes) -> bytes | None:
        """The offer itself, byte by byte."""
        try:
            is_offer = JsonObject(offer).find("do_remote_prefill") == b"true"
        except SpliceError:
            return None
        return offer if is_offer else None

    def release_body(self, offer: bytes) -> bytes:
        """A request that a decode engine is sure to refuse."""
        return b'{"model":"%b","prompt":"-","max_tokens":1,"kv_transfer_params":%b}' % (
            UNKNOWN_MODEL,
            offer,
        )
