"""The stack's router as whoever runs the stack meets it: its process, and where it listens.

Blocking; one thread at a time may use it.
"""

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import msgspec

from kvkeep.model.clock import SystemClock
from kvkeep.stack.engines import Launch
from kvkeep.stack.parts import PROBE_EVERY_S, Changed, RestartedPart, start_process
from kvkeep.stack.process import STOP_GRACE_S, StackProcess
from kvkeep.stack.readiness import make_client

PROBED_S_MAX = 10.0
"""Time to probe its engines before it counts as ready without them."""


class RouterReady(msgspec.Struct, frozen=True):
    """What the router says when it listens."""

    event: str
    url: str
    admin_url: str


class RouterPart(RestartedPart):
    """One router in front of the engines."""

    def __init__(
        self,
        launch: Callable[[], Launch],
        folder: Path,
        *,
        num_engines: int,
        drain_s: float,
        start_timeout_s: float,
        changed: Changed,
    ) -> None:
        """Prepare a router.

        Args:
            launch: Makes its command; the ports in it are always the same.
            folder: The stack's state folder.
            num_engines: It is ready when it has found so many that can be asked.
            drain_s: Requests may take so long when it is told to stop.
            start_timeout_s: Longest wait for it to be ready, in seconds.
            changed: Called when a process was started or ended.
        """
        self.name = self.title = "router"
        self.process: StackProcess = StackProcess(
            self.name, folder / "logs" / "router.log", stop_grace_s=STOP_GRACE_S + drain_s
        )
        super().__init__(start_timeout_s, changed)
        self._launch, self._folder, self._num_engines = launch, folder, num_engines
        self._ready: RouterReady | None = None
        self._heard_s: float | None = None
        self._probed_s = 0.0

    @property
    def was_ready(self) -> bool:
        """Whether its addresses are known."""
        return self._ready is not None

    @property
    def url(self) -> str:
        """The OpenAI-compatible address, without a path."""
        return self._said.url

    @property
    def admin_url(self) -> str:
        """Address of its metrics and workers, without a path."""
        return self._said.admin_url

    @property
    def pid(self) -> int:
        """Its own pid."""
        return self.process.pid

    @property
    def _said(self) -> RouterReady:
        assert self._ready is not None, "the router has not been ready yet"
        return self._ready

    def begin(self) -> None:
        """Start it; `await_ready` waits for it."""
        self._heard_s = None
        start_process(self.process, self._launch(), self._folder)
        self._changed()

    def is_ready(self) -> bool:
        """Whether it listens and its engines can be asked; every ``PROBE_EVERY_S`` at most."""
        now_s = SystemClock().now_s()
        if self._heard_s is None:
            said = find_ready_line(self.process.new_output())
            if said is None:
                return False
            self._ready, self._heard_s = said, now_s
        if now_s - self._probed_s < PROBE_EVERY_S:
            return False
        self._probed_s = now_s
        return self._num_ready() >= self._num_engines or now_s - self._heard_s > PROBED_S_MAX

    def _num_ready(self) -> int:
        """Engines that requests may go to; the page needs no key."""
        url = self._said.admin_url
        with make_client(url) as client:
            try:
                return int(client.get(f"{url}/ready").json()["ready"])
            except (httpx.HTTPError, ValueError, LookupError, TypeError):
                return -1

    def doing(self) -> str:
        """What it does until it is ready."""
        return "binding its ports" if self._heard_s is None else "asking the engines how they are"

    def kill(self) -> None:
        """End it with SIGKILL, as a crash would."""
        self.process.kill()
        self._changed()

    def stop(self) -> None:
        """End it when what runs is over, or its time is. Idempotent."""
        self.process.stop()


def find_ready_line(output: bytes) -> RouterReady | None:
    """The router's last announcement in its output; None while there is none."""
    for line in reversed(output.splitlines()):
        if line.startswith(b"{") and b'"ready"' in line:
            try:
                said = msgspec.convert(json.loads(line), RouterReady)
            except (ValueError, msgspec.ValidationError):
                continue  # not a whole line yet, or somebody else's
            if said.event == "ready":
                return said
    return None
