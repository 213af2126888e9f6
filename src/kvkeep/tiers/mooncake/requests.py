"""What the tier says to the process that holds Mooncake's client, and the answers.

Bytes never travel with a message: both processes map the same memory, and a message names places in
it.
"""

from enum import StrEnum

import msgspec

SCRATCH_REGION = 0
"""The lanes' own memory, known to the client from its start; regions of callers follow."""

Piece = tuple[int, int, int]
"""Region, offset in it, length; in bytes."""


class Operation(StrEnum):
    """What is asked of the client; see ``Answer.codes`` for what each returns."""

    WRITE = "write"
    READ = "read"
    SIZES = "sizes"
    DELETE = "delete"
    LOOKUP = "lookup"
    MAP = "map"
    CLOSE = "close"


class Ask(msgspec.Struct, array_like=True, frozen=True):
    """One request on one lane; the next follows its answer."""

    operation: Operation
    names: list[str] = []
    pieces: list[list[Piece]] = []
    """By name, where its bytes are or go. For ``MAP``: one region, its offset in the file, its
    length."""


class Answer(msgspec.Struct, array_like=True, frozen=True):
    """The answer to one request; also the greeting of a client that is ready, or can't be."""

    codes: list[int] = []
    """By name, Mooncake's code: negative is its error; else 0 for a write, a delete; 0 or 1 for
    ``LOOKUP``; bytes for a read and for ``SIZES``."""
    complaint: str = ""
    """Why the client can't work, for a person; empty: it can."""


class Setup(msgspec.Struct, frozen=True):
    """What a client is started with, as JSON on its command line."""

    lanes: list[int]
    """File descriptors, one socket each."""
    scratch_fd: int
    """Of the file with the lanes' memory; -1: a process that only holds a segment."""
    scratch_bytes: int
    master: str
    metadata: str
    local_hostname: str
    listen_address: str
    """The only one it may listen on, in digits; empty: every one."""
    protocol: str
    rdma_devices: str
    segment_bytes: int
    local_buffer_bytes: int
    replica_num: int


ask_encoder = msgspec.msgpack.Encoder()
ask_decoder = msgspec.msgpack.Decoder(Ask)
answer_decoder = msgspec.msgpack.Decoder(Answer)
