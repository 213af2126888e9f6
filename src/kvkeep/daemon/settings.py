"""What a daemon can be told, from one YAML file, the environment and flags.

Precedence: flag, environment (``KVKEEP_`` and the field's name), file, default.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from kvkeep.core.quotas import OTHERS, TENANTS_MAX
from kvkeep.daemon.sequences.settings import SequenceSettings, with_sequence_sizes
from kvkeep.daemon.tier_settings import (
    AnyTierSettings,
    Share,
    check_places,
    with_names,
    with_sizes,
)
from kvkeep.model.settings import sources
from kvkeep.model.sizes import parse_bytes

ENVIRONMENT_PREFIX = "KVKEEP_"
ROUTER_PREFIX = "KVKEEP_ROUTER_"
"""The router's variables, which it checks itself: one environment may serve both."""
_DAEMON = sources.Program(
    name="daemon",
    prefix=ENVIRONMENT_PREFIX,
    not_its_own=(ROUTER_PREFIX,),
    example="pool_bytes: 2GiB",
)
SOCKET_PATH_BYTES_MAX = 107
"""``sun_path`` of Linux, less its terminating zero (unix(7))."""
EVENTS_PATH_BYTES_MAX = SOCKET_PATH_BYTES_MAX - len(".replay")
"""A second socket has a longer name."""


def runtime_folder() -> Path:
    """Where sockets of this user live: private, and gone after a reboot."""
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return Path(base) / f"kvkeep-{os.getuid()}"


TenantName = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class DaemonSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of one daemon; each is checked when it is made."""

    pool_bytes: Annotated[int, msgspec.Meta(ge=1 << 24, le=1 << 46)] = 2 << 30
    """Size of the shared-memory pool in bytes (16 MiB to 64 TiB); ``2GiB`` style is understood."""
    socket: str = ""
    """Path of the control socket; empty: ``default.sock`` in this user's runtime folder."""
    pool: str = ""
    """Path of the pool; empty: a name in /dev/shm that follows from the socket's path."""
    metrics_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    """TCP port on 127.0.0.1 for /metrics, /status and /health; 0 takes a free one."""
    lease_s_max: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 60.0
    """The longest lease a client gets, in seconds."""
    sessions_max: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 256
    """Connections at once; an engine holds two, and one more per further rank."""
    verify_on_start: bool = True
    """Whether a restarted daemon checks the digest of every block it takes over."""
    eviction: Literal["lru", "s3fifo"] = "lru"
    """Which block of the pool makes room first: the least recently used, or S3-FIFO."""
    planner: Literal["auto", "load", "recompute"] = "auto"
    """Whether blocks of lower tiers are loaded: where measured faster, always, or never."""
    quotas: dict[TenantName, Share] = {}
    """Share of the pool by tenant, as engines name it (``tenant``): what it can count on, not a
    limit. The others share what is left; together at most 1."""
    events_socket: str = ""
    """Path of a socket at which routers of this user hear which blocks the daemon keeps, as numbers
    that say nothing of tokens (docs/routing.md); empty: none is told."""
    tiers: list[AnyTierSettings] = []
    """Where blocks go below the pool, the fastest first; each has a ``kind``."""
    sequences: SequenceSettings | None = None
    """Where named sequences' K/V can be kept over HTTP (docs/sequences.md); none: nowhere."""

    def __post_init__(self) -> None:
        if "\0" in self.socket + self.pool:
            raise ValueError("a path holds no zero byte: write another socket or pool")
        if OTHERS in self.quotas:
            raise ValueError(f"quotas can't name {OTHERS!r}, which stands for all it does not name")
        if not sum(self.quotas.values()) <= 1 + 1e-9:
            raise ValueError("quotas are more than 1 together: lower a share")
        if len(self.quotas) > TENANTS_MAX:
            raise ValueError(f"quotas names more than {TENANTS_MAX} tenants: leave some out")
        check_places(with_names(self.tiers))
        if len(self.socket_path.encode()) > SOCKET_PATH_BYTES_MAX:
            raise ValueError(
                f"socket has more than {SOCKET_PATH_BYTES_MAX} bytes, the limit of Unix sockets: "
                "choose a shorter path"
            )
        if len(self.events_socket.encode()) > EVENTS_PATH_BYTES_MAX or "\0" in self.events_socket:
            raise ValueError(
                f"events_socket has more than {EVENTS_PATH_BYTES_MAX} bytes, or a zero byte: "
                "choose a shorter path"
            )
        if self.events_socket and os.path.realpath(self.events_socket) == os.path.realpath(
            self.socket_path
        ):
            raise ValueError("events_socket is socket: give it a path of its own")

    @property
    def named_tiers(self) -> list[AnyTierSettings]:
        """The tiers, each with a name that no other has."""
        return with_names(self.tiers)

    @property
    def socket_path(self) -> str:
        """The control socket's path, default applied."""
        return self.socket or str(runtime_folder() / "default.sock")

    @property
    def pool_path(self) -> Path:
        """The pool's path, default applied."""
        if self.pool:
            return Path(self.pool)
        path = os.path.abspath(self.socket_path)
        name = re.sub(r"[^A-Za-z0-9.]+", "-", path).strip("-")
        # Two paths may read alike once they are a name.
        mark = hashlib.blake2b(path.encode(), digest_size=4).hexdigest()
        return Path("/dev/shm") / f"kvkeep-{os.getuid()}-{name[-160:]}-{mark}.pool"


def load_settings(
    file: Path | None, environment: Mapping[str, str], flags: Mapping[str, object]
) -> DaemonSettings:
    """Combine what a user said; flags win, then the environment, then the file.

    Args:
        file: YAML mapping of field names, or None.
        environment: ``os.environ``; ``KVKEEP_POOL_BYTES`` sets ``pool_bytes``, and so on.
        flags: Only those that were given.

    Raises:
        InputError: One sentence that names the field and the mend.
    """
    return sources.load_settings(DaemonSettings, _DAEMON, file, environment, flags, _prepare)


def _prepare(values: dict[str, Any]) -> None:
    """Understand sizes such as ``2GiB``."""
    if "pool_bytes" in values:
        values["pool_bytes"] = parse_bytes(values["pool_bytes"])
    if isinstance(values.get("tiers"), list):
        values["tiers"] = [with_sizes(tier) for tier in values["tiers"]]
    if "sequences" in values:
        values["sequences"] = with_sequence_sizes(values["sequences"])
