"""A started server as the stack meets it: its process, and whether it answers.

Blocking; one thread at a time may use a part.
"""

import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import httpx

from kvkeep.model.clock import SystemClock
from kvkeep.stack.machine import HOST
from kvkeep.stack.parts import Changed, RestartedPart, start_process
from kvkeep.stack.process import StackProcess
from kvkeep.stack.readiness import make_client
from kvkeep.stack.servers.launch import ServerLaunch
from kvkeep.stack.servers.started import BUCKET, StartedServer

PROBE_EVERY_S = 0.1
PROBE_TIMEOUT_S = 2.0


class ServerPart(RestartedPart):
    """One server that the stack starts."""

    def __init__(
        self,
        server: StartedServer,
        how: ServerLaunch,
        folder: Path,
        *,
        start_timeout_s: float,
        changed: Changed,
    ) -> None:
        """Prepare a server.

        Args:
            server: Its port is chosen.
            how: What starts it.
            folder: The stack's state folder.
            start_timeout_s: Longest wait for it to answer, in seconds.
            changed: Called when its process was started or ended.
        """
        self.name = f"{server.kind}-server"
        self.title = f"server of tier {server.kind}"
        self.process: StackProcess = StackProcess(self.title, folder / "logs" / f"{self.name}.log")
        self.server, self.how = server, how
        self._folder = folder / "servers" / server.kind
        super().__init__(start_timeout_s, changed)
        self._probed_s = 0.0

    @property
    def address(self) -> str:
        """Host and port."""
        return f"{HOST}:{self.server.port}"

    def begin(self) -> None:
        """Start it; `await_ready` waits for it."""
        # What it writes there are blocks and passwords: nobody else's business.
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.server.kind == "object_store":
            (self._folder / "data").mkdir(exist_ok=True)
            # A log of SeaweedFS's master, named after its port: an earlier start had another.
            for path in self._folder.glob("data/m[0-9]*"):
                shutil.rmtree(path, ignore_errors=True)
        start_process(self.process, self.how.launch, self._folder)
        self._changed()

    def is_ready(self) -> bool:
        """Ask it; every ``PROBE_EVERY_S`` at most."""
        now_s = SystemClock().now_s()
        if now_s - self._probed_s < PROBE_EVERY_S:
            return False
        self._probed_s = now_s
        probes: dict[str, Callable[[StartedServer, ServerLaunch], bool]] = {
            "valkey": answers_valkey,
            "object_store": keeps_objects,
            "mooncake": answers_mooncake,
        }
        return probes[self.server.kind](self.server, self.how)

    def doing(self) -> str:
        """What it does until it is ready."""
        return "starting"

    def stop(self) -> None:
        """End it. Idempotent.

        Without warning: it keeps nothing but a cache, whose values are proven when they are read,
        and a polite end takes some of these servers ten seconds.
        """
        self.process.kill()

    def end(self) -> None:
        """End it for good, and remove what it was told; an object store's data stays."""
        self.stop()
        for name in self.how.launch.files:
            (self._folder / name).unlink(missing_ok=True)
        for path in self.how.leftovers():
            path.unlink(missing_ok=True)
        if self.server.kind != "object_store":
            shutil.rmtree(self._folder, ignore_errors=True)


def answers_valkey(server: StartedServer, how: ServerLaunch) -> bool:
    """Whether it answers PING to whoever has its password."""
    try:
        with socket.create_connection((HOST, server.port), PROBE_TIMEOUT_S) as connection:
            connection.sendall(f"AUTH {how.password}\r\nPING\r\n".encode())
            with connection.makefile("rb") as lines:
                return [lines.readline(), lines.readline()] == [b"+OK\r\n", b"+PONG\r\n"]
    except OSError:
        return False


def keeps_objects(server: StartedServer, how: ServerLaunch) -> bool:
    """Make the bucket, and see whether it takes an object and the S3 side answers."""
    bucket = f"http://{HOST}:{how.ports['filer.port']}/buckets/{BUCKET}"
    try:
        with make_client(bucket) as client:
            if client.post(f"{bucket}/").status_code not in (201, 409):
                return False
            if client.put(f"{bucket}/ready", content=b"ready").status_code >= 300:
                return False
            client.delete(f"{bucket}/ready")
            # It knows us not, and says so.
            answer = client.get(f"http://{HOST}:{server.port}/{BUCKET}/ready")
            return answer.status_code in (403, 404)
    except httpx.HTTPError:
        return False


def answers_mooncake(server: StartedServer, how: ServerLaunch) -> bool:
    """Whether the master says that it is well, and takes connections."""
    url = f"http://{HOST}:{how.ports['metrics']}"
    try:
        with make_client(url) as client:
            if client.get(f"{url}/health").status_code != 200:
                return False
        socket.create_connection((HOST, server.port), PROBE_TIMEOUT_S).close()
    except (httpx.HTTPError, OSError):
        return False
    return True
