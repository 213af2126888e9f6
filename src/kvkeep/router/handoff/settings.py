"""When and how prefill is handed off, each with its unit."""

from typing import Annotated, Literal

import msgspec

TransportName = Literal["pool", "nixl"]
FallbackName = Literal["none", "decode_alone"]
DecodePolicyName = Literal[
    "round_robin",
    "least_loaded",
    "power_of_two",
    "consistent_hash",
    "session_affinity",
    "prefix_aware",
]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]


class HandOffSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How requests are prefilled on one engine and decoded on another."""

    transport: TransportName = "pool"
    """How blocks get from one engine to the other: ``pool``, through the kvkeep daemon of their
    host, or ``nixl``, by vLLM's own NixlConnector."""
    min_tokens: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)] = 128
    """A prompt of which the decode engine would compute fewer tokens is not handed off; an
    estimate, four bytes a token."""
    decode_policy: DecodePolicyName = "least_loaded"
    """How a decode engine is chosen; ``policy`` chooses the prefill engine. With ``prefix_aware`` a
    prompt that a decode engine has already is not handed off."""
    fallback: FallbackName = "none"
    """When a hand-off fails before its response has begun: ``none`` answers with an error,
    ``decode_alone`` has a decode engine compute the prompt."""
    client_params: Literal["refuse", "decode_alone"] = "refuse"
    """A request that brings ``kv_transfer_params`` itself is refused with 400, or goes to a decode
    engine as it is: such parameters can name memory of other engines."""
    prefill_timeout_s: Seconds = 120.0
    """From sending a prefill until its whole answer."""
    decode_timeout_s: Seconds = 600.0
    """From sending the request to a decode engine until its response begins, which is its end if it
    is not streamed; after that ``relay.upstream_silence_s`` counts."""
    prefill_attempts: Annotated[int, msgspec.Meta(ge=1, le=8)] = 2
    """Prefill engines that one request is sent to at most, under the retry budget."""
    decode_attempts: Annotated[int, msgspec.Meta(ge=1, le=8)] = 3
    """The same of decode engines."""
    offer_lease_s: Seconds = 30.0
    """How long a prefill engine keeps blocks for a decode engine (``nixl``: what its engines have
    as ``kv_lease_duration``)."""
    offer_margin_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 5.0
    """A decode engine is not sent to fetch blocks whose lease has less than this left."""

    def __post_init__(self) -> None:
        if self.offer_margin_s >= self.offer_lease_s:
            raise ValueError("offer_margin_s must be less than offer_lease_s")
