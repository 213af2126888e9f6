"""A server that the stack file names, as the stack meets it.

Blocking; one thread at a time may use a part.
"""

import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import httpx

from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import InputError
from kvkeep.stack.engines import LOOPBACK_ENVIRONMENT, Launch
from kvkeep.stack.machine import HOST
from kvkeep.stack.parts import Changed, RestartedPart, start_process
from kvkeep.stack.process import StackProcess
from kvkeep.stack.readiness import make_client
from kvkeep.stack.servers.launch import ServerLaunch
from kvkeep.stack.servers.named import ServerSpec, ready_of
from kvkeep.tiers.mooncake.listening import listening_environment

PROBE_EVERY_S = 0.1
PROBE_TIMEOUT_S = 2.0


def find_command(server: ServerSpec) -> list[str]:
    """Its command with the path of its program.

    Raises:
        InputError: There is no such program.
    """
    name, *arguments = server.command
    if "/" in name:
        path = name if os.access(name, os.X_OK) and not os.path.isdir(name) else None
    else:
        path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        raise InputError(
            f"servers.{server.name}.command: there is no program {name} here; install what has it, "
            "or write its path."
        )
    return [path, *arguments]


class NamedServerPart(RestartedPart):
    """One server that the stack file names."""

    def __init__(
        self,
        server: ServerSpec,
        folder: Path,
        *,
        start_timeout_s: float,
        changed: Changed,
        let_go: Callable[[int], None],
    ) -> None:
        """Prepare a server.

        Args:
            server: Its ports are chosen.
            folder: The stack's state folder.
            start_timeout_s: Longest wait for it to answer, in seconds.
            changed: Called when its process was started or ended.
            let_go: Frees a port that was held for it: it may not know how to share one.

        Raises:
            InputError: Its program is not installed.
        """
        self.name, self.title = server.name, f"server {server.name}"
        self.process: StackProcess = StackProcess(self.title, folder / "logs" / f"{self.name}.log")
        self.server = server
        # Many such programs listen on every address of the host, unless told otherwise or always.
        loopback = {**LOOPBACK_ENVIRONMENT, **listening_environment(HOST)}
        environment = {**os.environ, **loopback, **server.env}
        self.how = ServerLaunch(Launch(command=find_command(server), environment=environment))
        self._folder = folder / "servers" / server.name
        self._let_go = let_go
        super().__init__(start_timeout_s, changed)
        self._probed_s = 0.0

    def begin(self) -> None:
        """Start it; `await_ready` waits for it."""
        for port in self.server.ports.values():
            self._let_go(port)
        start_process(self.process, self.how.launch, self._folder)
        self._changed()

    def is_ready(self) -> bool:
        """Ask it; every ``PROBE_EVERY_S`` at most."""
        now_s = SystemClock().now_s()
        if now_s - self._probed_s < PROBE_EVERY_S:
            return False
        self._probed_s = now_s
        return answers(self.server)

    def doing(self) -> str:
        """What it does until it is ready."""
        return "starting"

    def stop(self) -> None:
        """End it, politely first: it may have shared memory to give back. Idempotent."""
        self.process.stop()

    def end(self) -> None:
        """End it for good, and remove what it wrote in its folder; its log stays."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


def answers(server: ServerSpec) -> bool:
    """Whether it is ready, as its entry in the file has it."""
    name, path = ready_of(server)
    if not name:
        return True
    port = server.ports[name]
    try:
        if path:
            url = f"http://{HOST}:{port}"
            with make_client(url) as client:
                return client.get(f"{url}{path}").is_success
        socket.create_connection((HOST, port), PROBE_TIMEOUT_S).close()
    except (httpx.HTTPError, OSError):
        return False
    return True
