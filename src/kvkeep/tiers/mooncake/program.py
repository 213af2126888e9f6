"""The process that holds Mooncake's client: `python -m kvkeep.tiers.mooncake.program SETUP`.

It lives as long as the tier keeps its sockets and its standard input open. It is meant to be
killed: on a timeout that is what makes the caller's memory quiet again.
"""

import fcntl
import mmap
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np

from kvkeep.protocol.frames import FrameReader, frame
from kvkeep.tiers.mooncake.listening import why_not_alone
from kvkeep.tiers.mooncake.requests import (
    SCRATCH_REGION,
    Answer,
    Ask,
    Operation,
    Piece,
    Setup,
    ask_decoder,
    ask_encoder,
)

_RECEIVE_BYTES: Final = 1 << 16


class Client:
    """Mooncake's client, and the memory that requests name."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._bases: dict[int, int] = {}
        """First address of each region in this process."""
        self._maps: list[mmap.mmap] = []

    def open(self) -> str:
        """Connect to the master; returns what is wrong, or nothing."""
        setup = self._setup
        if setup.listen_address and (why := why_not_alone(setup.listen_address)):
            return why
        try:
            from mooncake.store import (
                MooncakeDistributedStore,
                ReplicateConfig,
            )
        except ImportError as error:
            return f"its client can't be loaded ({error}): install libibverbs1 and librdmacm1"
        self._store: Any = MooncakeDistributedStore()
        code = self._store.setup(
            setup.local_hostname,
            setup.metadata,
            setup.segment_bytes,
            setup.local_buffer_bytes,
            setup.protocol,
            setup.rdma_devices,
            setup.master,
        )
        if code:
            return f"the master at {setup.master} does not take the client (code {code})"
        self._config: Any = ReplicateConfig()
        self._config.replica_num = setup.replica_num
        if setup.scratch_fd >= 0 and self._map(
            setup.scratch_fd, (SCRATCH_REGION, 0, setup.scratch_bytes)
        ):
            return "the lanes' memory could not be registered"
        return ""

    def _map(self, fd: int, piece: Piece) -> int:
        region, offset, length = piece
        start = offset - offset % mmap.PAGESIZE
        memory = mmap.mmap(fd, offset - start + length, offset=start)
        os.close(fd)
        self._maps.append(memory)
        base = int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)
        self._bases[region] = base + offset - start
        if self._setup.protocol == "tcp":
            # TCP moves from and to any address, and what is registered, peers on the network may
            # read and overwrite (0.3.13, TcpTransport::registerLocalMemory ignores
            # remote_accessible).
            return 0
        return int(self._store.register_buffer(base, len(memory)))

    def answer(self, ask: Ask, fds: Sequence[int]) -> list[int]:
        """Return one code for each name."""
        store, names = self._store, ask.names
        match ask.operation:
            case Operation.WRITE:
                return self._write(names, ask.pieces)
            case Operation.READ:
                return self._read(names, ask.pieces)
            case Operation.SIZES:
                return [store.get_size(name) for name in names]
            case Operation.DELETE:
                # By force: else a value that was read in the last seconds would stay.
                return list(store.batch_remove(names, True))
            case Operation.LOOKUP:
                return list(store.batch_is_exist(names))
            case Operation.MAP:
                return [self._map(fds[0], ask.pieces[0][0])]
            case Operation.CLOSE:
                return [store.close()]

    def _write(self, names: list[str], pieces: list[list[Piece]]) -> list[int]:
        store, config = self._store, self._config
        addresses, lengths = self._places(pieces)
        if all(len(value) == 1 for value in addresses):
            firsts, sizes = [value[0] for value in addresses], [value[0] for value in lengths]
            return list(store.batch_put_from(names, firsts, sizes, config))
        return list(store.batch_put_from_multi_buffers(names, addresses, lengths, config))

    def _read(self, names: list[str], pieces: list[list[Piece]]) -> list[int]:
        addresses, lengths = self._places(pieces)
        if all(len(room) == 1 for room in addresses):
            # This call takes room that is longer than the value; the other wants it exact.
            firsts = [room[0] for room in addresses]
            return list(
                self._store.batch_get_into(names, firsts, [length for (length,) in lengths])
            )
        return list(self._store.batch_get_into_multi_buffers(names, addresses, lengths))

    def _places(self, pieces: list[list[Piece]]) -> tuple[list[list[int]], list[list[int]]]:
        bases = self._bases
        addresses = [[bases[region] + offset for region, offset, _ in room] for room in pieces]
        return addresses, [[length for _, _, length in room] for room in pieces]


def serve(lane: socket.socket, client: Client) -> None:
    """Answer one request after the other; the process ends with the lane, or with a defect."""
    frames = FrameReader()
    fds: list[int] = []
    try:
        while True:
            data, received, _, _ = socket.recv_fds(lane, _RECEIVE_BYTES, 1)
            fds += received
            if not data:
                break
            for message in frames.feed(data):
                ask = ask_decoder.decode(message)
                answer = Answer(client.answer(ask, fds))
                fds.clear()
                lane.sendall(frame(ask_encoder.encode(answer)))
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        # Without the tier nobody reads the answers, and Mooncake's own threads would keep the
        # process.
        os._exit(0)


def end_with_owner(lifeline: int) -> None:
    """Have the kernel kill this process when the other end of a pipe closes.

    Mooncake's calls keep the interpreter's lock, some for minutes, while a store can't be reached:
    no thread of this process would notice in that time that its owner was killed.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:  # it closed before the kernel was told
        os._exit(1)


def main() -> None:
    """Open the client, say on the first lane whether it works, and serve the lanes."""
    end_with_owner(sys.stdin.fileno())
    setup = msgspec.json.decode(sys.argv[1], type=Setup)
    lanes = [socket.socket(fileno=fd) for fd in setup.lanes]
    client = Client(setup)
    complaint = client.open()
    lanes[0].sendall(frame(ask_encoder.encode(Answer(complaint=complaint))))
    if complaint:
        os._exit(1)
    for lane in lanes[1:]:
        threading.Thread(target=serve, args=(lane, client), daemon=True).start()
    serve(lanes[0], client)


if __name__ == "__main__":
    main()
