"""What the daemon holds, asked every few seconds on a thread of its own."""

import contextlib
import json
import os
import threading
from pathlib import Path
from typing import TextIO

from kvkeep.model.clock import SystemClock
from tests.integration.daemons import Daemon

FIELDS = {"resident_anonymous": "RssAnon", "shared_memory": "RssShmem", "threads": "Threads"}
"""Field of /proc/PID/status by series; memory is in KiB there."""
GAUGES = (
    *("read_leases", "write_leases", "slots_free", "slots_ready"),
    *("slots_writing", "slots_doomed", "slots_fenced", "sessions"),
)
UNITS = {"resident_anonymous": "MiB", "shared_memory": "MiB", "pool_file": "MiB"}
MIB = 1 << 20


def take_sample(daemon: Daemon, server_port: int) -> dict[str, float]:
    """All series at one moment.

    Args:
        daemon: Asked for its status, which counts as load.
        server_port: Of the server that is a tier. A second connection to it is opened when two
            calls meet, and closed a minute after that was last so: chance, which is counted apart.
    """
    text = Path(f"/proc/{daemon.pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in text.splitlines())
    sample = {name: float(fields[field].split()[0]) for name, field in FIELDS.items()}
    for name in ("resident_anonymous", "shared_memory"):
        sample[name] *= 1024 / MIB
    num_connections = _count_connections(daemon.pid, server_port)
    sample["server_connections"] = float(num_connections)
    sample["files"] = float(daemon.num_files() - num_connections)
    sample["pool_file"] = daemon.pool.stat().st_blocks * 512 / MIB
    gauges = daemon.status()["gauges"]
    return sample | {name: float(gauges[name]) for name in GAUGES}


def _count_connections(pid: int, port: int) -> int:
    """How many connections to this port a process holds (proc(5): ``net/tcp``)."""
    _, *rows = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()
    sockets = {
        f"socket:[{fields[9]}]"
        for fields in map(str.split, rows)
        if int(fields[2].rpartition(":")[2], 16) == port
    }
    held = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            held.add(os.readlink(fd))
    return len(sockets & held)


class Sampler:
    """Takes samples until it is stopped; each is a line of the log at once."""

    def __init__(self, daemon: Daemon, server_port: int, every_s: float, log: TextIO) -> None:
        self._daemon, self._server_port = daemon, server_port
        self._every_s, self._log = every_s, log
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler")
        self.series: dict[str, list[tuple[float, float]]] = {}
        """Seconds since the start and value, by name."""

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        clock = SystemClock()
        begun_s = clock.now_s()
        while not self._ended.wait(self._every_s):
            time_s = clock.now_s() - begun_s
            sample = take_sample(self._daemon, self._server_port)
            for name, value in sample.items():
                self.series.setdefault(name, []).append((time_s, value))
            print(json.dumps({"time_s": round(time_s, 1)} | sample), file=self._log, flush=True)
