"""Real routers and fake engines in processes of their own, and clients that count what they got."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.waiting import HANG_S

STOP_TIMEOUT_S = HANG_S
ROUTE = (sys.executable, "-m", "kvkeep", "route")
ENGINE = (sys.executable, "-m", "kvkeep.testing.fake_engine")


class Announced:
    """A process that prints one line of JSON when it is ready."""

    def __init__(self, command: Sequence[str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kvkeep-test-"))
        self._log = (self.folder / "log").open("wb")
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._log
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            text = self.log_text()
            self.stop()
            raise AssertionError(f"{command[2]} did not start: {text}")
        self.ready: dict[str, Any] = json.loads(line)

    def log_text(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)

    def terminate(self) -> None:
        """Tell it to stop; does not wait."""
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """Stop, wait, and tidy up; returns the exit code."""
        if self.process.poll() is None:
            self.terminate()
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        finally:
            self.process.kill()
            self.process.wait(STOP_TIMEOUT_S)
            if self.process.stdout is not None:
                self.process.stdout.close()
            self._log.close()
            shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def engines(count: int, *options: str) -> Iterator[list[str]]:
    """Addresses of fake engines in one process."""
    process = Announced([*ENGINE, "--num-engines", str(count), *options])
    try:
        yield process.ready["urls"]
    finally:
        process.stop()


@contextlib.contextmanager
def router(urls: Sequence[str], settings: dict[str, Any] | None = None) -> Iterator[Announced]:
    """A router before engines, all of them ready."""
    folder = Path(tempfile.mkdtemp(prefix="kvkeep-test-"))
    config = folder / "router.yaml"
    # Looked at often, and given up only by who is really gone.
    quick = {"health": {"interval_s": 0.2, "pause_s": 0.2, "timeout_s": HANG_S}}
    config.write_text(json.dumps({"engines": list(urls), "port": 0} | quick | (settings or {})))
    process = Announced([*ROUTE, "--config", str(config)])
    try:
        wait_for(process, lambda told: told["gauges"]["endpoints_ready"] >= len(urls))
        yield process
    finally:
        process.stop()
        shutil.rmtree(folder, ignore_errors=True)


def workers(process: Announced) -> dict[str, Any]:
    """What ``GET /workers`` answers."""
    answer = httpx.get(f"{process.ready['admin_url']}/workers", trust_env=False, timeout=HANG_S)
    found: dict[str, Any] = answer.raise_for_status().json()
    return found


def wait_for(process: Announced, is_so: Any, timeout_s: float = HANG_S) -> dict[str, Any]:
    """Ask for the workers until something holds."""
    from tests.integration.daemons import wait_until

    found: dict[str, Any] = {}

    def look() -> bool:
        found.clear()
        found.update(workers(process))
        return bool(is_so(found))

    wait_until(look, "what the test waits for", timeout_s)
    return found


def environment() -> dict[str, str]:
    """Of a command that a test runs."""
    return {name: value for name, value in os.environ.items() if not name.startswith("KVKEEP_")}
