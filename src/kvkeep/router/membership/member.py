"""An engine as somebody announces it: in a file, over the API, in etcd or on the command line."""

import functools
import re
from collections.abc import Sequence
from typing import Annotated
from urllib.parse import urlsplit

import msgspec

from kvkeep.model.errors import InputError
from kvkeep.model.plain import check_plain
from kvkeep.router.events.settings import EngineEvents
from kvkeep.router.snapshot import Role

MEMBERS_MAX = 1024
"""Of one source; a policy looks at each."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:\[\]-]{0,127}")
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}|[0-9A-Fa-f:.]{0,45})|::[0-9A-Fa-f:.]{0,45}")


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One engine of a fleet; whoever announces it says at least where it is."""

    url: str
    """``http://HOST:PORT``, nothing behind it."""
    name: str = ""
    """What it is called in headers and metrics; empty: ``HOST:PORT``."""
    role: Role = Role.SERVE
    """``serve``, ``prefill`` or ``decode``."""
    weight: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 1.0
    """Its share of the requests, where a policy has shares."""
    events: EngineEvents | None = None
    """Where it publishes its block events; none: where the router's own ``events`` say."""

    def __post_init__(self) -> None:
        parse_url(self.url)
        if self.name and not NAME.fullmatch(self.name):
            raise ValueError(
                "name must have letters, digits, dots, colons, dashes and underscores only"
            )

    @property
    def address(self) -> tuple[str, int]:
        """Host, without brackets, and port."""
        return parse_url(self.url)

    @property
    def title(self) -> str:
        """The name, default applied."""
        host, port = self.address
        return self.name or (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


@functools.lru_cache(maxsize=4 * MEMBERS_MAX)
def parse_url(url: str) -> tuple[str, int]:
    """Host and port of an engine's address.

    Raises:
        ValueError: It is none; the text says what to write.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    # urlsplit takes line ends out without a word.
    is_plain = url.isprintable() and not (
        parts.query or parts.fragment or parts.username or parts.path.strip("/")
    )
    if parts.scheme != "http" or not host or not _HOST.fullmatch(host) or not is_plain:
        raise ValueError(
            f"{url[:200]!r} is not an engine's address: write one like http://127.0.0.1:8000"
        )
    return host, 80 if port is None else port


def parse_members(text: bytes, source: str) -> list[Member]:
    """Read what a file says: a mapping with the list ``engines``, in YAML or JSON.

    Raises:
        InputError: It says something else, or one engine twice.
    """
    try:
        values = msgspec.yaml.decode(text)
        check_plain(values, source)
        listed = values.get("engines") if isinstance(values, dict) and len(values) == 1 else None
        if not isinstance(listed, list):
            raise InputError(
                f"{source} must be a list under 'engines:', such as "
                "'engines: [{url: http://127.0.0.1:8000}]'"
            )
        members = msgspec.convert(listed, list[Member], strict=False)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{source} is no list of engines: {' '.join(str(error).split())}"
        ) from error
    check_distinct(members, source)
    return members


def check_distinct(members: Sequence[Member], source: str) -> None:
    """Refuse two members of one name or one address.

    Raises:
        InputError: There are such, or more than ``MEMBERS_MAX``.
    """
    if len(members) > MEMBERS_MAX:
        raise InputError(f"{source} names {len(members)} engines: at most {MEMBERS_MAX}")
    names: set[str] = set()
    addresses: set[tuple[str, int]] = set()
    for member in members:
        if member.title in names or member.address in addresses:
            raise InputError(f"{source} has {member.title} or its address twice: leave one out")
        names.add(member.title)
        addresses.add(member.address)
