"""A tier whose server the stack starts: its entry says ``start: true`` in place of an address.

Values and checks only. The entry's other fields are the tier's own (see `daemon.tier_settings`);
the address follows from the port, which is chosen when the stack starts.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from kvkeep.daemon.tier_settings import with_sizes
from kvkeep.model.errors import InputError

BUCKET = "kvkeep"
PORT_UNKNOWN = 1
"""Stands in an address that is only checked."""


class StartedFields(msgspec.Struct, frozen=True, kw_only=True):
    """What a tier's entry may say of the server that the stack starts for it."""

    start: bool = False
    """True: the stack starts the tier's server; leave its address out, and give its size
    (``capacity_bytes``, for Mooncake ``segment_bytes``)."""
    port: int = 0
    """TCP port of that server on 127.0.0.1; 0 takes a free one."""


class StartedServer(msgspec.Struct, frozen=True):
    """A server that the stack starts."""

    kind: str
    """Of the tier; there is one server of a kind."""
    port: int
    """0: not chosen yet."""
    size_bytes: int
    """Of what it keeps; for Mooncake of what the daemon lends it."""
    tier_idx: int
    """Place in ``daemon.tiers``."""


_SIZE_FIELDS: Mapping[str, str] = {
    "valkey": "capacity_bytes",
    "object_store": "capacity_bytes",
    "mooncake": "segment_bytes",
}
_ADDRESS_FIELDS: Mapping[str, Sequence[str]] = {
    "valkey": ("url", "ca_file"),
    "object_store": ("url", "endpoint", "region"),
    "mooncake": ("master", "metadata", "local_hostname", "listen_address"),
}


def is_started(tier: Any) -> bool:
    """Whether the stack starts this tier's server."""
    return isinstance(tier, dict) and tier.get("start") is True


def find_started(tiers: Sequence[Any]) -> Iterator[StartedServer]:
    """The servers that these tiers need, in their order; the tiers are checked."""
    for idx, tier in enumerate(tiers):
        if is_started(tier):
            size = with_sizes(tier)[_SIZE_FIELDS[tier["kind"]]]
            yield StartedServer(tier["kind"], tier.get("port", 0), size, idx)


def find_lent(tiers: Sequence[Any]) -> Iterator[tuple[str, int]]:
    """Memory of this machine that checked tiers take beside the pool: field, and bytes.

    A started Valkey fills its share; what is lent to Mooncake is, whoever started its master.
    """
    for idx, tier in enumerate(tiers):
        if tier["kind"] == "mooncake" or (tier["kind"] == "valkey" and is_started(tier)):
            field = _SIZE_FIELDS[tier["kind"]]
            yield f"daemon.tiers[{idx}].{field}", with_sizes(tier).get(field, 0)


def client_settings(tier: Any) -> Any:
    """What the daemon is told of a tier: its entry, with the address of a started server."""
    if not isinstance(tier, dict) or not tier.keys() & {"start", "port"}:
        return tier
    entry = {name: value for name, value in tier.items() if name not in ("start", "port")}
    if not is_started(tier):
        return entry
    port = tier.get("port") or PORT_UNKNOWN
    match tier["kind"]:
        case "valkey":
            return entry | {"url": f"valkey://127.0.0.1:{port}/0"}
        case "object_store":
            return entry | {"url": f"s3://{BUCKET}", "endpoint": f"http://127.0.0.1:{port}"}
        case _:
            return entry | {"master": f"127.0.0.1:{port}"}


def with_ports(tiers: Sequence[Any], ports: Mapping[int, int]) -> list[Any]:
    """The tiers, with the ports of their servers by the tier's place in the list."""
    return [tier | {"port": ports[idx]} if idx in ports else tier for idx, tier in enumerate(tiers)]


def check_started(tiers: Sequence[Any]) -> None:
    """Check what entries say of servers to start.

    Raises:
        InputError: One sentence that names the field and the mend.
    """
    kinds = Counter(tier.get("kind") for tier in tiers if isinstance(tier, dict))
    for idx, tier in enumerate(tiers):
        if isinstance(tier, dict) and tier.keys() & {"start", "port"}:
            _check_one(tier, f"daemon.tiers[{idx}]")
            if is_started(tier) and kinds[tier["kind"]] > 1:
                # They would share one user and password in the daemon's environment.
                raise InputError(
                    f"daemon.tiers[{idx}].start: another tier is {tier['kind']} too; have the "
                    "stack start the server only where the kind is there once."
                )


def _check_one(tier: Mapping[str, Any], field: str) -> None:
    kind, start, port = str(tier.get("kind")), tier.get("start", False), tier.get("port", 0)
    if not isinstance(start, bool):
        raise InputError(f"{field}.start = {start}: write true or false.")
    if not start:
        if "port" in tier:
            raise InputError(f"{field}.port: only a server that is started has one; leave it out.")
        return
    if kind not in _SIZE_FIELDS:
        kinds = ", ".join(_SIZE_FIELDS)
        raise InputError(f"{field}.start: {kind} has no server to start, only {kinds} have.")
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
        raise InputError(f"{field}.port = {port}: write a TCP port, or 0 for a free one.")
    for name in _ADDRESS_FIELDS[kind]:
        if name in tier:
            raise InputError(f"{field}.{name}: leave it out, start: true makes it.")
    size = _SIZE_FIELDS[kind]
    if not tier.get(size):
        raise InputError(f"{field}.{size}: it is missing; say how much the server may keep.")
