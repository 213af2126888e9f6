"""What may happen to a value that stands on a server behind its head."""

from collections.abc import Callable

from kvkeep.testing.tier_contract import block_key, value_bytes
from kvkeep.tiers.entry_names import HEAD_BYTES, entry_name, pack_head


def stored(number: int, prefix: str) -> bytes:
    """A value of the tiers' contract as it stands on a server, with its head."""
    name, value = entry_name(block_key(number), prefix), value_bytes(number)
    return pack_head(name, len(value)) + value


def _flipped(entry: bytes, at: int) -> bytes:
    return entry[:at] + bytes([entry[at] ^ 1]) + entry[at + 1 :]


def flipped_magic(entry: bytes) -> bytes:
    """A bit of the first eight bytes."""
    return _flipped(entry, 0)


def flipped_length(entry: bytes) -> bytes:
    """A bit of the value's length."""
    return _flipped(entry, 9)


def flipped_name(entry: bytes) -> bytes:
    """A bit of what stands for the name: it is another block's."""
    return _flipped(entry, 16)


def cut(entry: bytes) -> bytes:
    """Half of it."""
    return entry[: len(entry) // 2]


def cut_in_the_head(entry: bytes) -> bytes:
    """Less than a head."""
    return entry[: HEAD_BYTES - 1]


def grown(entry: bytes) -> bytes:
    """More than was written, and than there is room for."""
    return entry + b"x"


HEAD_DAMAGES: tuple[Callable[[bytes], bytes], ...] = (
    flipped_magic,
    flipped_length,
    flipped_name,
    cut,
    cut_in_the_head,
    grown,
)
