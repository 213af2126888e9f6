"""Messages to bytes and back; what it does not know exactly, it rejects."""

import itertools
import struct
from collections.abc import Sequence

import msgspec

from kvkeep.model.errors import InputError
from kvkeep.model.ids import HASH_BYTES, BlockHash
from kvkeep.protocol.frames import frame
from kvkeep.protocol.messages import Message, ToClient, ToDaemon

_MANY_HASHES = struct.Struct(f"{HASH_BYTES}s" * 32)
_encoder = msgspec.msgpack.Encoder()
_to_daemon: msgspec.msgpack.Decoder[ToDaemon] = msgspec.msgpack.Decoder(ToDaemon)
_to_client: msgspec.msgpack.Decoder[ToClient] = msgspec.msgpack.Decoder(ToClient)


def encode(message: Message) -> bytes:
    """A whole frame."""
    return frame(_encoder.encode(message))


def decode_to_daemon(payload: bytes) -> ToDaemon:
    """Read one message from a client.

    Raises:
        InputError: Not a message of this version; nothing was done.
    """
    try:
        return _to_daemon.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"not a message to the daemon: {error}") from error


def decode_to_client(payload: bytes) -> ToClient:
    """Read one message from the daemon.

    Raises:
        InputError: Not a message of this version.
    """
    try:
        return _to_client.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"not a message to a client: {error}") from error


def join_hashes(hashes: Sequence[BlockHash]) -> bytes:
    """Block hashes as one byte string."""
    return b"".join(hashes)


def split_hashes(joined: bytes) -> list[BlockHash]:
    """Undo ``join_hashes``.

    Raises:
        InputError: The length is not a whole number of hashes.
    """
    if len(joined) % HASH_BYTES:
        raise InputError(f"hashes have {HASH_BYTES} bytes each. bytes={len(joined)}")
    # Many at once: a quarter of what 625 slices cost, in the path that a scheduler waits for.
    end = len(joined) - len(joined) % _MANY_HASHES.size
    found = list(itertools.chain.from_iterable(_MANY_HASHES.iter_unpack(joined[:end])))
    found += [joined[i : i + HASH_BYTES] for i in range(end, len(joined), HASH_BYTES)]
    return found


def join_slots(slots: Sequence[int]) -> bytes:
    """Slot indices as uint32 little-endian."""
    return struct.pack(f"<{len(slots)}I", *slots)


def split_slots(joined: bytes) -> tuple[int, ...]:
    """Undo ``join_slots``.

    Raises:
        InputError: The length is not a whole number of slots.
    """
    if len(joined) % 4:
        raise InputError(f"slots have 4 bytes each. bytes={len(joined)}")
    return struct.unpack(f"<{len(joined) // 4}I", joined)
