"""Ports for the servers of tests."""

import socket
from pathlib import Path

from tests.servers.processes import PORTS, SHARE, free_port


def test_a_port_is_nobodys_between_its_choice_and_its_use() -> None:
    """No connection is given it by the kernel, and no other server of this process."""
    first, _ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    ports = [free_port() for _ in range(SHARE // 2)]

    assert len(set(ports)) == len(ports)
    assert max(ports) < int(first)
    assert set(ports) <= set(PORTS)


def test_a_port_in_use_is_passed_over() -> None:
    """Whoever has it."""
    following = free_port() + 1
    with socket.create_server(("127.0.0.1", following)):
        assert free_port() != following
