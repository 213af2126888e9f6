"""What a daemon can be told about the tiers below its pool: a list, the fastest first."""

import contextlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import msgspec

from kvkeep.model.addresses import checked_folder, checked_host, place_of
from kvkeep.model.errors import InputError
from kvkeep.model.sizes import parse_bytes
from kvkeep.tiers.entry_names import checked_prefix
from kvkeep.tiers.mooncake.settings import parse_master
from kvkeep.tiers.object_store import parse_endpoint, parse_location
from kvkeep.tiers.valkey_wire import parse_url

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
    """Refuse places that can't be, and two tiers that would keep their blocks in one.

    Args:
        tiers: Each with its name.

    Raises:
        ValueError: Says which, and the mend.
    """
    users: list[tuple[_Place, AnyTierSettings]] = []
    for tier in tiers:
        places = _checked_places(tier)
        for place, (taken, other) in itertools.product(places, users):
            if place.overlaps(taken):
                folders = isinstance(tier, DiskTierSettings) or isinstance(other, DiskTierSettings)
                mend = (
                    "give each a folder of its own"
                    if folders
                    else "leave one out, or give each a prefix of its own"
                )
                raise ValueError(
                    f"the tiers {other.name!r} and {tier.name!r} would keep their blocks in one "
                    f"place: {mend}"
                )
        users += [(place, tier) for place in places]


class _Place(msgspec.Struct, frozen=True):
    """What two tiers can't both have, in one spelling."""

    where: tuple[object, ...]
    prefix: str | None = None
    """Of the names that are used there; None: all are."""

    def overlaps(self, other: "_Place") -> bool:
        both = (self.prefix, other.prefix)
        return self.where == other.where and (None in both or self.prefix == other.prefix)


def _checked_places(tier: AnyTierSettings) -> "list[_Place]":
    """Where a tier keeps its blocks.

    Raises:
        ValueError: There can be no such place, or a text of the tier holds a zero byte.
    """
    for field in tier.__struct_fields__:
        value = getattr(tier, field)
        if any("\0" in text for text in (value if isinstance(value, list) else [str(value)])):
            raise ValueError(
                f"the tier {tier.name}: {field} holds a zero byte, which no path or address can: "
                "write another"
            )
    try:
        return list(_places(tier))
    except (InputError, ValueError) as error:
        raise ValueError(f"the tier {tier.name}: {error}") from None


def _places(tier: AnyTierSettings) -> "Iterator[_Place]":
    if isinstance(tier, DiskTierSettings):
        for where in _folder_places(tier.folder, "folder"):
            yield _Place(where)
        return
    prefix = checked_prefix(tier.prefix)
    match tier:
        case ValkeyTierSettings():
            address, _, _ = parse_url(tier.url)
            host = address.unix_path and os.path.realpath(address.unix_path)
            host = host or place_of(checked_host(address.host))
            port = 0 if address.unix_path else address.port
            yield _Place((tier.kind, host, port, address.database), prefix)
        case ObjectStoreTierSettings():
            scheme, place = parse_location(tier.url)
            if scheme == "file":
                for where in _folder_places(place, "the folder of `url`"):
                    yield _Place(where, prefix)
            if tier.endpoint:
                parse_endpoint(tier.endpoint)
            if scheme == "s3":
                # As the tier does.
                endpoint = tier.endpoint or os.environ.get("AWS_ENDPOINT_URL", "")
                _, host, port, path = parse_endpoint(endpoint) if endpoint else ("", "", 0, "")
                yield _Place((tier.kind, place_of(host), port, path, place), prefix)
        case MooncakeTierSettings():
            host, port = parse_master(tier.master)
            yield _Place((tier.kind, place_of(host), port), prefix)


def _folder_places(folder: str, field: str) -> Iterator[tuple[object, ...]]:
    try:
        path = checked_folder(folder)
    except ValueError as error:
        raise ValueError(f"{field} can't be, {error}: write another") from None
    yield ("folder", path)
    with contextlib.suppress(OSError):
        # The same folder in two places of the file system: a bind mount.
        found = os.stat(path)
        yield ("inode", found.st_dev, found.st_ino)


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
