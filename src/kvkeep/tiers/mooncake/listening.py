"""Where Mooncake's client listens: on one address, which its library itself can't be told.

The process that holds the client is started with a few lines of C before the C library's ``bind``
(``_one_address.c``, docs/decisions/0022-mooncake-listens-on-one-address.md).
"""

import importlib.util
import ipaddress
import os
import socket
from pathlib import Path
from typing import Final

from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.tiers.mooncake.settings import MooncakeSettings

ADDRESS_VARIABLE: Final = "KVKEEP_LISTENING_ADDRESS"
_LIBRARY: Final = "kvkeep.tiers.mooncake._one_address"
_MEND: Final = (
    "install a C compiler and then kvkeep anew, or let it listen on every address with "
    "listen_address: 0.0.0.0"
)


def find_library() -> Path | None:
    """Path of the compiled ``_one_address.c``; None where it was not built."""
    found = importlib.util.find_spec(_LIBRARY)
    return None if found is None or found.origin is None else Path(found.origin)


def listening_address(settings: MooncakeSettings) -> str:
    """Find the address that the client may listen on, in digits; empty: every one.

    May ask the name service.

    Raises:
        UnavailableError: ``local_hostname`` is a name that can't be resolved now.
    """
    host = settings.listen_address or _without_port(settings.local_hostname)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = ipaddress.ip_address(_resolved(host))
    return "" if address.is_unspecified else str(address)


def _without_port(host: str) -> str:
    """A host of ``host``, ``host:port``, ``[host]:port`` or of a bare IPv6 address."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0] if host.count(":") == 1 else host


def _resolved(host: str) -> str:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UnavailableError(
            f"Mooncake Store can't be used: local_hostname {host!r} has no address ({error})"
        ) from error
    # Mooncake's own choice, unless MC_USE_IPV6 is set; then settings name the address.
    family_first = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)
    return str(family_first[0][4][0])


def check_library(settings: MooncakeSettings) -> None:
    """Refuse a client that nothing would keep from listening on every address.

    Raises:
        InputError: One sentence that says what to do.
    """
    host = settings.listen_address or _without_port(settings.local_hostname)
    is_every = host in ("0.0.0.0", "::")
    if not is_every and find_library() is None:
        raise InputError(
            f"Mooncake's client would listen on every address of this host, not on {host} alone: "
            f"the part of kvkeep that sees to it was not built; {_MEND}"
        )


def listening_environment(address: str) -> dict[str, str]:
    """What the client's process needs in its environment to listen on this address alone."""
    library = find_library()
    if not address or library is None:
        return {}
    preloaded = [str(library), os.environ.get("LD_PRELOAD", "")]
    return {"LD_PRELOAD": ":".join(filter(None, preloaded)), ADDRESS_VARIABLE: address}


def why_not_alone(address: str) -> str:
    """Say why this process, the client's, can't listen on that address alone; empty: it can.

    It is tried, with a socket that is gone afterwards: a library that can't be preloaded is no
    error to the loader.
    """
    is_v6 = ":" in address
    with socket.socket(socket.AF_INET6 if is_v6 else socket.AF_INET) as probe:
        try:
            probe.bind(("::" if is_v6 else "0.0.0.0", 0))
        except OSError as error:
            return (
                f"it can't listen on {address} ({error.strerror}): "
                "name an address of this host in listen_address"
            )
        bound = str(probe.getsockname()[0])
    if ipaddress.ip_address(bound) == ipaddress.ip_address(address):
        return ""
    return (
        f"it would listen on every address of this host, not on {address} alone: "
        f"{find_library()} was not loaded into its process; {_MEND}"
    )
