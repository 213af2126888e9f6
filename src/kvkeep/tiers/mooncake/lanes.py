"""A child process with Mooncake's client: started, asked over its lanes, killed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import UnavailableError
from kvkeep.protocol.frames import FrameReader, frame
from kvkeep.tiers.mooncake.listening import listening_environment
from kvkeep.tiers.mooncake.requests import (
    Answer,
    Ask,
    Operation,
    Setup,
    answer_decoder,
    ask_encoder,
)
from kvkeep.tiers.mooncake.settings import MooncakeSettings

NUM_LANES: Final = 4
"""Requests in flight: two hide one's control messages behind the other's bytes, and a slow peer
holds two more."""
START_TIMEOUT_S: Final = 20.0
"""Until a client is ready: loading its library on a busy machine, and its greeting to the
master."""
CLOSE_TIMEOUT_S: Final = 3.0
"""For a segment to be taken off the master's list; a killed one stays there until its
``client_ttl``."""
_RECEIVE_BYTES: Final = 1 << 16

_clock = SystemClock()


@dataclass(frozen=True, slots=True)
class Lane:
    """One request at a time to the client."""

    index: int
    socket: socket.socket


class ClientProcess:
    """A child that lives until ``kill`` or ``close``. Thread-safe."""

    def __init__(
        self, settings: MooncakeSettings, address: str, scratch_fd: int, scratch_bytes: int
    ) -> None:
        """Start it; ``wait_ready`` says whether it works.

        Args:
            settings: The tier's.
            address: The only one it may listen on; empty: every one.
            scratch_fd: The lanes' memory; -1 for a process that does nothing but hold the segment.
            scratch_bytes: Its size.
        """
        self._timeout_s = settings.timeout_s
        num_lanes = NUM_LANES if scratch_fd >= 0 else 1
        pairs = [socket.socketpair() for _ in range(num_lanes)]
        self._lanes = [Lane(index, ours) for index, (ours, _) in enumerate(pairs)]
        self._free: list[Lane] = []
        self._is_ready = False
        self._is_closed = False
        self._changed = threading.Condition()
        theirs = [pair[1].fileno() for pair in pairs]
        setup = _setup(settings, address, theirs, (scratch_fd, scratch_bytes))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "kvkeep.tiers.mooncake.program", setup],
                stdin=subprocess.PIPE,  # ends with this process, and the child with it
                stdout=subprocess.DEVNULL,
                pass_fds=[*theirs, *([scratch_fd] if scratch_fd >= 0 else [])],
                env=_environment(settings) | listening_environment(address),
                start_new_session=True,  # a terminal's Ctrl-C is the tier's business
            )
        except OSError:
            for lane in self._lanes:
                lane.socket.close()
            raise
        finally:
            for _, end in pairs:
                end.close()

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def wait_ready(self, timeout_s: float) -> None:
        """Wait for its greeting.

        Raises:
            UnavailableError: There was none, or it says why it can't work. It is killed.
        """
        answer = self._receive(self._lanes[0], _clock.now_s() + timeout_s)
        if answer.complaint:
            self.kill()
            raise UnavailableError(f"Mooncake Store can't be used: {answer.complaint}")
        with self._changed:
            self._is_ready = True
            self._free.extend(self._lanes)

    @contextlib.contextmanager
    def lane(self) -> Iterator[Lane]:
        """Have a lane, with its part of the scratch, to oneself.

        Raises:
            UnavailableError: All are in use for longer than a request may take.
        """
        lane = self._take_lane(_clock.now_s() + self._timeout_s)
        try:
            yield lane
        finally:
            self._give_lane(lane)

    def _take_lane(self, deadline_s: float) -> Lane:
        with self._changed:
            while not self._free and not self._is_closed:
                left_s = deadline_s - _clock.now_s()
                if left_s <= 0 or not self._changed.wait(left_s):
                    raise UnavailableError(
                        f"Mooncake Store is busy: no lane came free within {self._timeout_s} s"
                    )
            if self._is_closed:
                raise UnavailableError("Mooncake Store can't be used now: its client ended")
            # The one used last has its memory in the caches.
            return self._free.pop()

    def _give_lane(self, lane: Lane) -> None:
        with self._changed:
            if self._is_closed:
                lane.socket.close()
            else:
                self._free.append(lane)
                self._changed.notify()

    def ask(
        self, lane: Lane, ask: Ask, fds: Sequence[int] = (), timeout_s: float | None = None
    ) -> list[int]:
        """Send a request and wait for its answer.

        Raises:
            UnavailableError: There was none in time. The child is dead then, so it touches no
            memory any more.
        """
        deadline_s = _clock.now_s() + (self._timeout_s if timeout_s is None else timeout_s)
        payload = frame(ask_encoder.encode(ask))
        try:
            lane.socket.settimeout(max(deadline_s - _clock.now_s(), 1e-3))
            sent = socket.send_fds(lane.socket, [payload], fds)
            lane.socket.sendall(memoryview(payload)[sent:])
        except OSError as error:
            raise self._lost(error) from error
        return self._receive(lane, deadline_s).codes

    def _receive(self, lane: Lane, deadline_s: float) -> Answer:
        frames = FrameReader()
        try:
            while True:
                lane.socket.settimeout(max(deadline_s - _clock.now_s(), 1e-3))
                data = lane.socket.recv(_RECEIVE_BYTES)
                if not data:
                    raise ConnectionResetError("its client ended")
                for message in frames.feed(data):
                    return answer_decoder.decode(message)
        except OSError as error:
            raise self._lost(error) from error

    def _lost(self, error: OSError) -> UnavailableError:
        self.kill()
        why = "it did not answer in time" if isinstance(error, TimeoutError) else "its client ended"
        return UnavailableError(f"Mooncake Store can't be used now: {why}")

    def kill(self) -> None:
        """End it now; when this returns it is dead, and with it every transfer of its own."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def close(self, *, politely: bool) -> None:
        """End it and let go of it, once; a lane in use is closed by its user.

        Args:
            politely: Take its segment off the master's list before.
        """
        if politely and self.is_running():
            with contextlib.suppress(UnavailableError), self.lane() as lane:
                self.ask(lane, Ask(Operation.CLOSE), timeout_s=CLOSE_TIMEOUT_S)
        self.kill()
        with self._changed:
            self._is_closed = True
            for lane in self._free if self._is_ready else self._lanes:
                lane.socket.close()
            self._free.clear()
            self._changed.notify_all()


def _setup(
    settings: MooncakeSettings, address: str, lanes: list[int], scratch: tuple[int, int]
) -> str:
    fd, scratch_bytes = scratch
    setup = Setup(
        lanes=lanes,
        scratch_fd=fd,
        scratch_bytes=scratch_bytes,
        master=settings.master,
        metadata=settings.metadata,
        local_hostname=settings.local_hostname,
        listen_address=address,
        protocol=settings.protocol,
        rdma_devices=settings.rdma_devices,
        segment_bytes=settings.segment_bytes if fd < 0 else 0,
        local_buffer_bytes=settings.local_buffer_bytes,
        replica_num=settings.replica_num,
    )
    return json.dumps(msgspec.to_builtins(setup))


def _environment(settings: MooncakeSettings) -> dict[str, str]:
    """Return the child's environment: what the operator set, and what keeps it prompt and quiet."""
    timeout_ms = str(int(settings.timeout_s * 1e3))
    defaults = {
        "MC_RPC_TIMEOUT_MS": timeout_ms,
        "MC_RPC_CONNECT_TIMEOUT_MS": timeout_ms,
        # Each attempt to set up waits for the master; the tier has its own pause between attempts.
        "MC_STORE_CLIENT_SETUP_RETRIES": "1",
        # What it tells a metadata server; it binds nothing to it.
        "MC_TCP_BIND_ADDRESS": settings.local_hostname,
        # It logs every miss as an error; what matters reaches the caller as a code.
        "GLOG_minloglevel": "3",
        "MC_LOG_LEVEL": "ERROR",
    }
    return defaults | dict(os.environ)
