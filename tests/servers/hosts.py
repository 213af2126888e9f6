"""Two hosts and a third for a store: network namespaces on a switch of their own.

The switch lies in the third namespace, so that no packet can reach a network of this machine.
"""

import contextlib
import ctypes
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.waiting import HANG_S

CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


def _ip(*words: str) -> None:
    _run("ip", *words)


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr.strip()}"
    return done.stdout


@dataclass(frozen=True)
class Host:
    """One namespace, its address, and its end of a cable."""

    name: str
    address: str
    """Of RFC 5737's first block for documentation, which no real network has."""
    switch: str
    """Namespace at the other end of its cable; its own for the host that holds the switch."""
    port: str = ""
    """Its place in the switch; none for the host that holds it."""

    @property
    def within(self) -> tuple[str, ...]:
        """What stands before a command that is to run on this host."""
        return ("ip", "netns", "exec", self.name)

    def cut(self) -> None:
        """Pull the cable out."""
        _ip("-n", self.name, "link", "set", "cable", "down")

    def join(self) -> None:
        """Put it back."""
        _ip("-n", self.name, "link", "set", "cable", "up")

    def slow(self, bytes_per_s: float, at_once_bytes: int = 32 << 10) -> None:
        """Let no more than this arrive at the host, in bytes a second, until ``hurry``.

        Args:
            bytes_per_s: In the long run.
            at_once_bytes: What may come without delay, once.
        """
        speed = f"{max(1, round(8 * bytes_per_s))}bit"
        rate = ("rate", speed, "burst", str(at_once_bytes), "latency", "2s")
        _run("tc", "-n", self.switch, "qdisc", "replace", "dev", self.port, "root", "tbf", *rate)

    def hurry(self) -> None:
        """Undo ``slow``."""
        _run("tc", "-n", self.switch, "qdisc", "delete", "dev", self.port, "root")

    def received_bytes(self) -> int:
        """What arrived at the host so far."""
        text = _run("ip", "-n", self.name, "-statistics", "-json", "link", "show", "cable")
        return int(json.loads(text)[0]["stats64"]["rx"]["bytes"])

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Have this thread's new sockets be of this host."""
        before = os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY)
        inside = os.open(Path("/run/netns") / self.name, os.O_RDONLY)
        try:
            _enter(inside)
            try:
                yield
            finally:
                _enter(before)
        finally:
            os.close(inside)
            os.close(before)


def _enter(namespace: int) -> None:
    code = _LIBC.setns(namespace, CLONE_NEWNET)
    assert code == 0, f"the namespace can't be entered: {os.strerror(ctypes.get_errno())}"


@contextlib.contextmanager
def three_hosts() -> Iterator[tuple[Host, Host, Host]]:
    """Two hosts and one for a store, which is the last; all gone afterwards."""
    names = [f"kvkeep-{os.getpid()}-{suffix}" for suffix in ("a", "b", "store")]
    ports = ["port0", "port1", ""]
    hosts = [
        Host(name, f"192.0.2.{number}", names[2], port)
        for number, (name, port) in enumerate(zip(names, ports, strict=True), 1)
    ]
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
            _ip("-n", host.name, "link", "set", "lo", "up")
        switch = hosts[2]
        _ip("-n", switch.name, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch.name, "address", "add", f"{switch.address}/24", "dev", "switch")
        _ip("-n", switch.name, "link", "set", "switch", "up")
        for host in hosts[:2]:
            _connect(host)
        yield hosts[0], hosts[1], hosts[2]
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)


def _connect(host: Host) -> None:
    """Lay a cable from a host to the switch."""
    cable = ("type", "veth", "peer", "name", "cable", "netns", host.name)
    _ip("-n", host.switch, "link", "add", host.port, *cable)
    _ip("-n", host.switch, "link", "set", host.port, "master", "switch", "up")
    _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "cable")
    host.join()
