"""Limits of the relay, each with its unit."""

from typing import Annotated

import msgspec


class RelaySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the relay takes on, and how long it waits."""

    connections_max: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 8192
    """Clients at once; what is beyond is answered with 503."""
    body_bytes_max: Annotated[int, msgspec.Meta(ge=1 << 10, le=1 << 34)] = 256 << 20
    """Of a request's body; what is beyond is answered with 413."""
    gathered_bytes_max: Annotated[int, msgspec.Meta(ge=1 << 10, le=1 << 26)] = 1 << 20
    """Of a request's body that is gathered before an engine is chosen; more goes on in pieces,
    can't be sent a second time, and is routed by its headers alone."""
    head_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 15.0
    """From the first byte of a request until its head is over; then 408."""
    body_silence_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 60.0
    """Between two pieces of a request's body; then 408."""
    idle_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 75.0
    """A connection without a request is closed after this time."""
    stall_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 300.0
    """A client that takes nothing of its response for so long is cut off."""
    connect_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=600)] = 2.0
    """To an engine; then the request goes to another one, or is answered with 504."""
    upstream_silence_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 600.0
    """An engine that says nothing for so long has failed: 504, or an error in the stream."""
    upstream_idle_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 4.0
    """An idle connection to an engine is closed after this time; vLLM closes it after 5 s."""
    drain_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 30.0
    """After SIGTERM, running requests may take this long."""
    prefixes: tuple[Annotated[str, msgspec.Meta(pattern="^/")], ...] = (
        *("/v1/", "/v2/", "/tokenize", "/detokenize", "/pooling", "/classify", "/score"),
        *("/rerank", "/embed", "/inference/", "/ping", "/version", "/load"),
    )
    """Paths that are relayed begin like this; an engine's other paths (its metrics, its switches)
    are not for clients, who would reach any engine with them."""
