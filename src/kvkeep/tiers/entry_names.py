"""What a block is called on a server, and what stands in front of its bytes there.

The name is the whole block key behind a prefix, so that several deployments may share a server and
an operator can find or delete a model's blocks by the beginning of their names. The head in front
of the bytes tells a value of kvkeep's from anyone else's, a whole one from a part, and one block's
from another's, for the price of a few bytes. It proves nothing about the bytes behind it: that is
the verifying wrapper's.
"""

import logging
import re
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Final

import xxhash

from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.model.ids import HASH_BYTES, BlockHash, BlockKey, Namespace

log = logging.getLogger(__name__)

PREFIX_DEFAULT: Final = "kvkeep/"
PREFIX_CHARS_MAX: Final = 128
"""With the key's own 136 characters far below what any server takes (S3: 1024)."""

HEAD_BYTES: Final = 24
_MAGIC: Final = b"kvkeep\x00\x01"
_HEAD: Final = struct.Struct("<8sQQ")
"""Magic with the version of this head; length of the value behind it; XXH3-64 of its name."""

_PREFIX: Final = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]*/)+")
_HEX: Final = f"[0-9a-f]{{{2 * HASH_BYTES}}}"
_KEY: Final = re.compile(rf"({_HEX})/({_HEX})/(0|[1-9][0-9]{{0,4}})")
_GROUP_IDX_MAX: Final = 0xFFFF


def checked_prefix(prefix: str) -> str:
    """Return a prefix that is safe in every server's names and patterns.

    Raises:
        InputError: It is not.
    """
    if len(prefix) > PREFIX_CHARS_MAX or not _PREFIX.fullmatch(prefix):
        raise InputError(
            f"a prefix is at most {PREFIX_CHARS_MAX} letters, digits and ._- in parts that each "
            f"end in '/', such as {PREFIX_DEFAULT!r}: got {prefix[: PREFIX_CHARS_MAX + 1]!r}"
        )
    return prefix


def entry_name(key: BlockKey, prefix: str) -> str:
    """Return the name of a block on a server: different for different keys."""
    return f"{prefix}{key.namespace.hex()}/{key.block_hash.hex()}/{key.group_idx}"


def parse_entry_name(name: str, prefix: str) -> BlockKey | None:
    """Return the key that ``entry_name`` gave this name; None for any other name."""
    if not name.startswith(prefix):
        return None
    found = _KEY.fullmatch(name, len(prefix))
    if found is None or int(found[3]) > _GROUP_IDX_MAX:
        return None
    namespace, block_hash = bytes.fromhex(found[1]), bytes.fromhex(found[2])
    return BlockKey(Namespace(namespace), BlockHash(block_hash), int(found[3]))


def pack_head(name: str, value_bytes: int) -> bytes:
    """Return what goes in front of a value: ``HEAD_BYTES`` bytes."""
    return _HEAD.pack(_MAGIC, value_bytes, xxhash.xxh3_64_intdigest(name.encode()))


def is_head_of(head: bytes | bytearray | memoryview, name: str, value_bytes: int) -> bool:
    """Whether this stands in front of the whole value of this name, which is so long.

    ``value_bytes`` is below 0 where what was found is shorter than a head.
    """
    return value_bytes >= 0 and bytes(head) == pack_head(name, value_bytes)


class DamagedHeads:
    """What a tier read under names of its own that no head of theirs stands before. Thread-safe.

    Nobody writes such a value: it rotted, was cut, or was put in another's place. It is deleted, as
    it would be looked for and found again and again. A value that is whole and merely longer than
    the room, or that lies under another prefix, is none of these and stays.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self.number = 0
        """Found since the start."""

    def drop(self, keys: Sequence[BlockKey], delete: Callable[[Sequence[BlockKey]], None]) -> None:
        """Count these, and have the tier forget them; one that can't now is found again later."""
        if not keys:
            return
        with self._lock:
            before, self.number = self.number, self.number + len(keys)
        # A server that was tampered with would fill the log with one line a value.
        if before.bit_length() != self.number.bit_length():
            log.warning(
                "values with damaged heads were found. tier=%s number=%d", self._name, self.number
            )
        try:
            delete(keys)
        except UnavailableError as error:
            log.warning(
                "a damaged value can't be deleted. tier=%s reason=%s", self._name, str(error)
            )
