"""What a daemon can be told about the tiers below its pool: a list, the fastest first."""

import contextlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from kvkeep.model.sizes import parse_bytes

SIZE_FIELDS = ("capacity_bytes", "segment_bytes", "queue_bytes_max", "write_bytes_per_s")
"""Fields in which ``100GiB`` style is understood."""

POOL = "pool"
"""What the memory above all tiers is called; no tier is."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")

Bytes = Annotated[int, msgspec.Meta(ge=1 << 20, le=1 << 50)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=600)]
Threads = Annotated[int, msgspec.Meta(ge=1, le=64)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class TierSettings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"
):
    """What every kind of tier can be told."""

    name: str = ""
    """What figures and commands call it; empty: its kind, the second of a kind ``disk-2``, ..."""
    num_threads: Threads = 4
    """Calls to the medium at once."""
    queue_bytes_max: Bytes = 256 << 20
    """Bytes that wait to be written or read; beyond it blocks are not cascaded."""
    deadline_s: Seconds = 5.0
    """A call that takes longer closes the tier for a while, in seconds."""
    probation_share: Share = 0.5
    """Of the capacity, how much may be filled with blocks that were seen only once."""
    write_bytes_per_s: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)] = 0
    """At most so many bytes a second are written in the long run, as SSDs wear; 0: no limit."""
    key_files: list[str] = []
    """Files of 32 bytes (mode 0600): blocks are encrypted with keys made of the first, and read
    with keys made of any; empty: not encrypted."""
    compress: bool = False
    """Whether blocks are compressed, without loss: pays before slow media only."""

    @property
    def kind(self) -> str:
        """``disk``, ``valkey``, ..."""
        return str(self.__struct_config__.tag)


class DiskTierSettings(TierSettings, frozen=True, kw_only=True, tag="disk"):
    """A folder on a local disk, of this daemon alone."""

    folder: str
    """Made if it is not there; ``~`` is the home folder."""
    capacity_bytes: Bytes
    """Of all files in it, allocated as they are needed."""


class ValkeyTierSettings(TierSettings, frozen=True, kw_only=True, tag="valkey"):
    """A Valkey or Redis server; VALKEY_USER and VALKEY_PASSWORD of the environment are heeded."""

    url: str
    """``valkey://host:port/database``, ``valkeys://`` for TLS, or ``unix:///path``."""
    ca_file: str = ""
    """Certificates to trust under TLS; empty: the system's."""
    prefix: str = "kvkeep/"
    """In front of every key; deployments that share a server choose different ones."""
    timeout_s: Seconds = 2.0
    """For one call, in seconds."""
    capacity_bytes: Bytes = 1 << 40
    """What admission counts with; the server's own limit is its ``maxmemory``."""


class ObjectStoreTierSettings(TierSettings, frozen=True, kw_only=True, tag="object_store"):
    """An S3-compatible object store; credentials come from AWS_ACCESS_KEY_ID and its like."""

    url: str
    """``s3://bucket`` or ``file:///folder``."""
    endpoint: str = ""
    """``https://host:port`` of an S3 server; empty: AWS itself."""
    region: str = ""
    """Empty: AWS_REGION, or us-east-1."""
    allow_http: bool = False
    """Whether blocks may cross a network in clear; loopback may always."""
    prefix: str = "kvkeep/"
    """In front of every key."""
    timeout_s: Seconds = 10.0
    """For one call, in seconds; ``deadline_s`` is 15 here."""
    deadline_s: Seconds = 15.0
    capacity_bytes: Bytes = 1 << 44
    """What admission counts with."""


class MooncakeTierSettings(TierSettings, frozen=True, kw_only=True, tag="mooncake"):
    """A Mooncake Store."""

    master: str
    """``host:port`` of mooncake_master."""
    local_hostname: str = "127.0.0.1"
    """Of this machine, as others reach it."""
    listen_address: str = ""
    """Address that the client's ports are opened on; empty: that of ``local_hostname``; 0.0.0.0:
    every one of this machine."""
    metadata: str = "P2PHANDSHAKE"
    """Where peers learn of each other; this word: from each other."""
    protocol: str = "tcp"
    """``tcp`` or ``rdma``."""
    rdma_devices: str = ""
    """Names of devices with commas between them; empty: found by Mooncake."""
    segment_bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 46)] = 0
    """Memory that this daemon lends to the store; 0: it is a client only."""
    replica_num: Annotated[int, msgspec.Meta(ge=1, le=16)] = 1
    """Copies that a write asks for."""
    prefix: str = "kvkeep/"
    """In front of every key."""
    timeout_s: Seconds = 2.0
    """For one request, in seconds."""
    capacity_bytes: Bytes = 1 << 40
    """What admission counts with."""


AnyTierSettings = (
    DiskTierSettings | ValkeyTierSettings | ObjectStoreTierSettings | MooncakeTierSettings
)


def with_names(tiers: Sequence[AnyTierSettings]) -> list[AnyTierSettings]:
    """The tiers, each with a name that no other has.

    Raises:
        ValueError: A name can't be, or two tiers have it; says which, and the mend.
    """
    given = Counter(tier.name for tier in tiers if tier.name)
    for name, number in given.items():
        if name == POOL or not _NAME.fullmatch(name):
            raise ValueError(
                f"a tier's name can't be {name[:80]!r}: write small letters, digits, - and _, "
                f"at most 64, and not {POOL!r}"
            )
        if number > 1:
            raise ValueError(f"{number} tiers have the name {name!r}: give each a name of its own")
    taken = set(given)
    named: list[AnyTierSettings] = []
    for tier in tiers:
        name = tier.name
        if not name:
            numbered = (f"{tier.kind}-{number}" for number in itertools.count(2))
            name = next(n for n in itertools.chain([tier.kind], numbered) if n not in taken)
            taken.add(name)
        named.append(msgspec.structs.replace(tier, name=name))
    return named


def check_places(tiers: Sequence[AnyTierSettings]) -> None:
    """Refuse two tiers that would keep their blocks in one place.

    Args:
        tiers: Each with its name.

    Raises:
        ValueError: Says which two, and the mend.
    """
    users: dict[object, TierSettings] = {}
    for tier in tiers:
        for place in _places(tier):
            other = users.setdefault(place, tier)
            if other is not tier:
                mend = (
                    "give each a folder of its own"
                    if isinstance(tier, DiskTierSettings)
                    else "leave one out, or give each a prefix of its own"
                )
                raise ValueError(
                    f"the tiers {other.name!r} and {tier.name!r} would keep their blocks in one "
                    f"place: {mend}"
                )


def _places(tier: AnyTierSettings) -> list[object]:
    """What two tiers can't both have, in one spelling."""
    match tier:
        case DiskTierSettings():
            folder = os.path.realpath(os.path.expanduser(tier.folder))
            places: list[object] = [("folder", folder)]
            with contextlib.suppress(OSError):
                # The same folder in two places of the file system: a bind mount.
                found = os.stat(folder)
                places.append(("inode", found.st_dev, found.st_ino))
            return places
        case ValkeyTierSettings():
            return [(tier.kind, tier.url, tier.prefix)]
        case ObjectStoreTierSettings():
            return [(tier.kind, tier.endpoint.rstrip("/"), tier.url.rstrip("/"), tier.prefix)]
        case MooncakeTierSettings():
            return [(tier.kind, tier.master, tier.prefix)]


def with_sizes(tier: Any) -> Any:
    """What a user wrote of one tier, with sizes such as ``100GiB`` in bytes.

    Raises:
        InputError: Something is not a size.
    """
    if not isinstance(tier, dict):
        return tier
    return {
        name: parse_bytes(value) if name in SIZE_FIELDS else value for name, value in tier.items()
    }
