"""Keeps Mooncake's processes running: one to ask, and one to hold this host's segment.

A client that failed is killed and another one started, as soon as the master can be reached. Until
that one is ready, callers are told at once that the store is away: the start of a client is the
probe of the circuit breaker.
"""

import logging
import os
import socket
import threading
from typing import Final

from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import UnavailableError
from kvkeep.tiers.mooncake.lanes import START_TIMEOUT_S, ClientProcess
from kvkeep.tiers.mooncake.listening import listening_address
from kvkeep.tiers.mooncake.requests import Ask, Operation
from kvkeep.tiers.mooncake.settings import MooncakeSettings
from kvkeep.tiers.mooncake.shared_regions import Region

log = logging.getLogger(__name__)

CHECK_S: Final = 1.0
"""Between looks at processes that run."""
RETRY_S: Final = 0.25
"""Between attempts to reach a master that refuses connections; doubled for clients that fail
repeatedly."""
RETRY_S_MAX: Final = 8.0
"""Between starts of clients that fail each time: starting one costs half a second of a core."""

_clock = SystemClock()


class Supervisor:
    """Owns the processes. Thread-safe."""

    def __init__(self, settings: MooncakeSettings, scratch_fd: int, scratch_bytes: int) -> None:
        """Begin to start them, on a thread of its own."""
        self._settings = settings
        self._scratch = scratch_fd, scratch_bytes
        self._lock = threading.Lock()
        self._client: ClientProcess | None = None
        self._segment: ClientProcess | None = None
        self._starting: ClientProcess | None = None
        self._regions: list[Region] = []
        self._why = "its client is still starting"
        self._num_failures = 0
        """Of clients, since one has answered."""
        self._stopped = threading.Event()
        self._wake = threading.Event()
        self._changed = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._run, name="kvkeep-mooncake", daemon=True)
        self._thread.start()

    def client(self) -> ClientProcess:
        """Return the process to ask.

        Raises:
            UnavailableError: There is none now.
        """
        client = self._client
        if client is None:
            raise UnavailableError(f"Mooncake Store can't be used now: {self._why}")
        return client

    def wait_ready(self, timeout_s: float) -> bool:
        """Whether, after at most this long, all processes work."""
        deadline_s = _clock.now_s() + timeout_s
        with self._changed:
            while not self._is_ready():
                left_s = deadline_s - _clock.now_s()
                if left_s <= 0 or self._stopped.is_set():
                    return False
                self._changed.wait(left_s)
            return True

    def _is_ready(self) -> bool:
        has_segment = self._segment is not None or not self._settings.segment_bytes
        return self._client is not None and has_segment

    def pids(self) -> list[int]:
        """Of the processes that work now: the client's, then the segment's."""
        with self._lock:
            return [process.pid for process in (self._client, self._segment) if process is not None]

    def answered(self) -> None:
        """Note that the store works."""
        self._num_failures = 0

    def lost(self, client: ClientProcess, error: UnavailableError) -> None:
        """Give up a client; the next one is started."""
        client.kill()
        with self._lock:
            if self._client is client:
                self._client = None
                self._why = str(error)
                self._num_failures += 1
                log.warning("%s", error)
                client.close(politely=False)
        self._wake.set()

    def register(self, region: Region) -> None:
        """Have this memory mapped by the client, and by each that follows.

        Raises:
            UnavailableError: This client can't; it is replaced.
        """
        with self._lock:
            self._regions.append(region)
            client = self._client
            if client is None:
                return
            try:
                _map(client, region)
            except UnavailableError:
                # The next client maps it before anyone can ask it.
                self._client = None
                client.close(politely=False)
                self._wake.set()
                raise

    def close(self) -> None:
        """End all processes and the thread."""
        with self._changed:
            self._stopped.set()
            starting = self._starting
            self._changed.notify_all()
        if starting is not None:
            starting.kill()
        self._wake.set()
        self._thread.join()
        if self._client is not None:
            self._client.close(politely=False)
        if self._segment is not None:
            self._segment.close(politely=True)
        for region in self._regions:
            os.close(region.fd)

    # --- On the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopped.is_set():
            if self._check():
                self._wake.wait(CHECK_S)
                self._wake.clear()
            elif self._is_master_there():
                # The first failure is a mishap; the next ones say that something is wrong.
                exponent = min(self._num_failures - 1, 10)
                pause_s = min(RETRY_S * 2**exponent, RETRY_S_MAX) if exponent > 0 else 0.0
                if not self._stopped.wait(pause_s):
                    self._start_missing()
            else:
                self._why = f"nothing answers at the master's address {self._settings.master}"
                self._stopped.wait(RETRY_S)

    def _check(self) -> bool:
        """Whether all run; lets go of those that ended by themselves."""
        with self._lock:
            for process in (self._client, self._segment):
                if process is not None and not process.is_running():
                    log.warning("a process of Mooncake's client ended by itself: starting another")
                    process.close(politely=False)
                    self._client = None if process is self._client else self._client
                    self._segment = None if process is self._segment else self._segment
                    self._why = "its client ended"
            return self._is_ready()

    def _start_missing(self) -> None:
        try:
            if self._settings.segment_bytes and self._segment is None:
                self._segment = self._started(-1, 0)
            if self._client is None:
                self._publish(self._started(*self._scratch))
        except UnavailableError as error:
            self._num_failures += 1
            self._why = str(error)
            if not self._stopped.is_set():
                log.warning("%s", error)
        with self._changed:
            self._changed.notify_all()

    def _is_master_there(self) -> bool:
        host, _, port = self._settings.master.rpartition(":")
        try:
            address = host.strip("[]"), int(port)
            socket.create_connection(address, self._settings.timeout_s).close()
        except OSError:
            return False
        return True

    def _started(self, scratch_fd: int, scratch_bytes: int) -> ClientProcess:
        address = listening_address(self._settings)
        with self._lock:
            if self._stopped.is_set():
                raise UnavailableError("Mooncake Store is closed")
            try:
                process = ClientProcess(self._settings, address, scratch_fd, scratch_bytes)
            except OSError as error:
                raise UnavailableError(f"Mooncake's client can't be started: {error}") from error
            self._starting = process
        try:
            process.wait_ready(START_TIMEOUT_S)
        except UnavailableError:
            process.close(politely=False)
            raise
        finally:
            self._starting = None
        return process

    def _publish(self, client: ClientProcess) -> None:
        with self._lock:
            try:
                for region in self._regions:
                    _map(client, region)
            except UnavailableError:
                client.close(politely=False)
                raise
            self._client = client


def _map(client: ClientProcess, region: Region) -> None:
    ask = Ask(Operation.MAP, pieces=[[(region.number, region.offset, region.num_bytes)]])
    with client.lane() as lane:
        # With RDMA every page is pinned.
        (code,) = client.ask(lane, ask, [region.fd], START_TIMEOUT_S)
    if code:
        client.kill()
        raise UnavailableError(f"Mooncake refused to register {region.num_bytes} bytes: {code}")
