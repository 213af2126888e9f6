"""Which addresses processes listen on, as the kernel sees it."""

import contextlib
import ipaddress
import os
import struct
from collections.abc import Iterator
from pathlib import Path

_LISTEN = "0A"
"""State of a TCP socket (include/net/tcp_states.h)."""


def children_of(pid: int) -> list[int]:
    """Pids of a process's children."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            found += map(int, file.read_text().split())
    return found


def listening_addresses(pid: int) -> list[str]:
    """The address of each TCP socket that a process listens on, in the network it is in."""
    own = _sockets_of(pid)
    return [
        _address(local.partition(":")[0])
        for table in ("tcp", "tcp6")
        for local, state, inode in _sockets_in(Path(f"/proc/{pid}/net/{table}"))
        if state == _LISTEN and inode in own
    ]


def _sockets_of(pid: int) -> set[str]:
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            link = os.readlink(path)
            if link.startswith("socket:["):
                found.add(link[len("socket:[") : -1])
    return found


def _sockets_in(table: Path) -> Iterator[tuple[str, str, str]]:
    """Address with port, state and inode of each socket of a network."""
    for line in table.read_text().splitlines()[1:]:
        fields = line.split()
        yield fields[1], fields[3], fields[9]


def _address(text: str) -> str:
    """From hexadecimal words in this machine's order; IPv4 as such, also where it is mapped."""
    words = [int(text[idx : idx + 8], 16) for idx in range(0, len(text), 8)]
    address = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
