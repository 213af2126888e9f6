"""Hosts, ports and folders as a user writes them: whether there can be such, and in one spelling.

Nobody is asked: a name may be right and unknown today. Each refusal is an end of a sentence, and
holds nothing of the text, which may have a password in it.
"""

import contextlib
import ipaddress
import os
import re
from typing import Final
from urllib.parse import SplitResult, urlsplit

HOST_CHARS_MAX: Final = 253
"""RFC 1035, 2.3.4, without the final dot."""
PORT_MAX: Final = (1 << 16) - 1
SOCKET_PATH_BYTES_MAX: Final = 107
"""``sun_path`` of Linux, less its terminating zero (unix(7))."""
PATH_BYTES_MAX: Final = 4095
NAME_BYTES_MAX: Final = 255
"""Of a file or folder (``NAME_MAX``)."""
_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_HERE: Final = ("127.0.0.1", "::1", "0.0.0.0", "::", "localhost.localdomain")
"""What leads to a server on this machine, as ``localhost`` does."""


def split_url(url: str) -> SplitResult:
    """Take an address apart.

    Raises:
        ValueError: Its brackets are none of an IPv6 address.
    """
    if not url.isprintable():
        raise ValueError("it holds characters that can't be printed")
    try:
        return urlsplit(url)
    except ValueError:
        raise ValueError("its brackets stand around no IPv6 address") from None


def port_of(parts: SplitResult, default: int) -> int:
    """The port of an address.

    Raises:
        ValueError: It can't be.
    """
    try:
        port = default if parts.port is None else parts.port
    except ValueError:
        port = 0
    if not 0 < port <= PORT_MAX:
        raise ValueError(f"its port is none from 1 to {PORT_MAX}")
    return port


def checked_host(host: str) -> str:
    """A host's name or address, in one spelling of each.

    Args:
        host: Without brackets.

    Raises:
        ValueError: No host can be called so.
    """
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        mapped = getattr(address, "ipv4_mapped", None)
        return str(mapped or address)
    try:
        name = host.lower().removesuffix(".")
        name = name if name.isascii() else name.encode("idna").decode()
    except UnicodeError:
        raise ValueError("its host is no name of a host") from None
    labels = name.split(".")
    if len(name) > HOST_CHARS_MAX or not all(map(_LABEL.fullmatch, labels)):
        raise ValueError("its host is no name of a host")
    if labels[-1].isdigit():
        return _ipv4(labels)  # no name ends in a number (RFC 3696, 2)
    return name


def _ipv4(labels: list[str]) -> str:
    """An address as ``inet_aton(3)`` reads it, without octal numbers: 127.1 is 127.0.0.1."""
    *first, last = labels
    is_short = len(labels) <= 4 and all(
        label == "0" or (label.isdigit() and label[0] != "0" and len(label) <= 10)
        for label in labels
    )
    if not is_short or any(int(label) > 255 for label in first):
        raise ValueError("its host is no IP address")
    packed = bytes(map(int, first))
    try:
        return str(ipaddress.IPv4Address(packed + int(last).to_bytes(4 - len(packed), "big")))
    except OverflowError:
        raise ValueError("its host is no IP address") from None


def place_of(host: str) -> str:
    """A checked host, with one spelling for this machine."""
    return "localhost" if host in _HERE else host


def split_host_port(text: str) -> tuple[str, int]:
    """Read ``host:port``, an IPv6 address in brackets or without them.

    Raises:
        ValueError: It is none.
    """
    host, _, digits = text.rpartition(":")
    is_number = digits.isascii() and digits.isdigit() and len(digits) <= len(str(PORT_MAX))
    if not host or not is_number or not 0 < int(digits) <= PORT_MAX:
        raise ValueError("it has no host, or no port behind it")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    return checked_host(host), int(digits)


def check_socket_path(path: str) -> None:
    """Refuse what no Unix socket can be called.

    Raises:
        ValueError: It is too long, or holds a zero byte.
    """
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX or "\0" in path:
        raise ValueError(
            f"its path has more than {SOCKET_PATH_BYTES_MAX} bytes, the limit of Unix sockets, or "
            "a zero byte"
        )


def checked_folder(folder: str) -> str:
    """A folder with its symbolic links followed; ``~`` is the home folder.

    Raises:
        ValueError: There can be no such folder.
    """
    if not folder:
        raise ValueError("it is empty")
    if "\0" in folder:
        raise ValueError("a path holds no zero byte")
    whole = os.path.expanduser(folder)
    if whole.startswith("~"):
        raise ValueError("this user has no home folder here")
    path = os.fsencode(os.path.abspath(whole))
    if len(path) > PATH_BYTES_MAX or max(map(len, path.split(b"/"))) > NAME_BYTES_MAX:
        raise ValueError(
            f"a path has at most {PATH_BYTES_MAX} bytes, and {NAME_BYTES_MAX} in each name"
        )
    return os.path.realpath(whole)
