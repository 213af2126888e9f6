"""What the tier on Mooncake Store can be told."""

import contextlib
import ipaddress
from dataclasses import dataclass
from typing import Literal

from kvkeep.model.addresses import checked_host, split_host_port
from kvkeep.model.errors import InputError
from kvkeep.tiers.base import VALUE_BYTES_MAX
from kvkeep.tiers.entry_names import PREFIX_DEFAULT, checked_prefix

REQUEST_BYTES_MAX = 32 << 20
"""Bytes in one request to the store: 3 ms on loopback, and a timeout that still means something on
1 GbE."""
REPLICAS_MAX = 16
TIMEOUT_S_MAX = 600.0
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class MooncakeSettings:
    """Settings of one ``MooncakeTier``; each is checked when it is made."""

    master: str
    """``host:port`` of the ``mooncake_master``."""
    metadata: str = "P2PHANDSHAKE"
    """Where peers learn of each other; this word: from each other, with no metadata server."""
    local_hostname: str = "127.0.0.1"
    """Address of this host as its peers see it."""
    listen_address: str = ""
    """Address that the client's ports are opened on; empty: that of ``local_hostname``; 0.0.0.0:
    every one of this host."""
    protocol: Literal["tcp", "rdma"] = "tcp"
    rdma_devices: str = ""
    """Names of devices with commas between them; empty: found by Mooncake. Of ``rdma`` only."""
    segment_bytes: int = 0
    """Memory of this host that the store may fill, held by a process of this tier; 0: none."""
    local_buffer_bytes: int = 16 * MIB
    """Mooncake's own staging buffer in each of its processes; kvkeep's transfers go around it."""
    replica_num: int = 1
    """Copies that a write asks for; the store keeps fewer where it has too few processes."""
    prefix: str = PREFIX_DEFAULT
    """In front of every key, so that deployments may share a store."""
    timeout_s: float = 2.0
    """For one request of at most ``REQUEST_BYTES_MAX`` or one value; longer calls are several."""
    value_bytes_max: int = 64 * MIB
    """Longest value; each of the lanes has this much shared memory, touched when it is needed."""

    def __post_init__(self) -> None:
        checked_prefix(self.prefix)
        parse_master(self.master)
        _check_host(self.local_hostname)
        if self.protocol not in ("tcp", "rdma"):
            raise InputError(
                f"Mooncake's protocol {self.protocol!r} is not known here: choose tcp or rdma"
            )
        if self.listen_address:
            _check_address(self.listen_address)
        limits = [
            ("segment_bytes", self.segment_bytes, 0, 1 << 46),
            ("local_buffer_bytes", self.local_buffer_bytes, 0, 1 << 40),
            ("replica_num", self.replica_num, 1, REPLICAS_MAX),
            ("timeout_s", self.timeout_s, 0.05, TIMEOUT_S_MAX),
            ("value_bytes_max", self.value_bytes_max, 1, VALUE_BYTES_MAX),
        ]
        for name, value, low, high in limits:
            if not low <= value <= high:
                raise InputError(f"{name} = {value} is out of range: choose {low} to {high}")


def parse_master(text: str) -> tuple[str, int]:
    """Host, in one spelling, and port of a ``mooncake_master``.

    Raises:
        InputError: It is none.
    """
    try:
        return split_host_port(text)
    except ValueError as error:
        raise InputError(
            f"{text[:80]!r} is no address of a mooncake_master, {error}: write host:port, "
            "such as 127.0.0.1:50051"
        ) from None


def _check_host(text: str) -> None:
    try:
        checked_host(text)
    except ValueError as error:
        with contextlib.suppress(ValueError):
            split_host_port(text)
            return
        raise InputError(
            f"local_hostname = {text[:80]!r} can't be, {error}: write a name or address of this "
            "host"
        ) from None


def _check_address(text: str) -> None:
    try:
        ipaddress.ip_address(text)
    except ValueError as error:
        raise InputError(
            f"listen_address = {text!r} is no IP address: write one of this host's, or 0.0.0.0 "
            "for every one"
        ) from error
