"""Keys of values at rest: one for each namespace, derived from master keys that lie in files.

A namespace holds the tenant, so tenants never share a key. Master keys are told apart by an id that
is derived from them too: nothing has to be numbered, and a file cannot be given another's number.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from kvkeep.model.errors import InputError
from kvkeep.model.ids import Namespace
from kvkeep.model.private_file import read_private

KEY_BYTES = 32
"""AES-256."""
KEY_ID_BYTES = 8
MASTER_KEYS_MAX = 16
"""One that writes and the retired ones whose values are still read."""


@dataclass(frozen=True, slots=True)
class TenantKey:
    """The key for the values of one namespace, and what tells it from its predecessors."""

    key_id: bytes
    """``KEY_ID_BYTES`` bytes, stored in the clear beside each value."""
    key: bytes = field(repr=False)
    """``KEY_BYTES`` bytes."""


class Keys(Protocol):
    """Who may write and read what. Pure or thread-safe: tiers ask from several threads."""

    def find_writing(self, namespace: Namespace) -> TenantKey | None:
        """The key for new values of a namespace; None if they may not be written."""

    def find_reading(self, namespace: Namespace, key_id: bytes) -> TenantKey | None:
        """The key that a value was written with; None if it is unknown here."""


class KeyRing:
    """Keys of all namespaces, by HKDF-SHA256 from master keys. Thread-safe: it never changes."""

    def __init__(self, masters: Sequence[bytes]) -> None:
        """Hold the first master key for writing, and all for reading.

        Raises:
            InputError: There is none or there are too many, or one is not ``KEY_BYTES`` long.
        """
        if not 1 <= len(masters) <= MASTER_KEYS_MAX:
            raise InputError(
                f"encryption needs 1 to {MASTER_KEYS_MAX} key files, not {len(masters)}"
            )
        if any(len(master) != KEY_BYTES for master in masters):
            raise InputError(f"a master key has {KEY_BYTES} bytes")
        self._masters = {
            _derive(master, b"kvkeep key id 1", KEY_ID_BYTES): master for master in masters
        }
        self._writing_id = next(iter(self._masters))

    @staticmethod
    def load(paths: Sequence[Path]) -> "KeyRing":
        """Read master keys from files: the first for writing, all for reading.

        A file holds 32 bytes, or 64 hexadecimal digits and perhaps a line end, and nobody else may
        read it. To change the key, put a new file first; take an old one away when its values are
        no longer wanted. Where several hosts share a tier, first add the new file behind the old
        one everywhere, as a value under an unknown key is deleted.

        Raises:
            InputError: A file can't be read, is not a key, or is open to others.
        """
        return KeyRing([read_key_file(path) for path in paths])

    def find_writing(self, namespace: Namespace) -> TenantKey:
        """The key for new values of a namespace."""
        return _tenant_key(self._writing_id, self._masters[self._writing_id], namespace)

    def find_reading(self, namespace: Namespace, key_id: bytes) -> TenantKey | None:
        """The key that a value was written with; None if its master key is not held."""
        master = self._masters.get(key_id)
        return None if master is None else _tenant_key(key_id, master, namespace)


def _tenant_key(key_id: bytes, master: bytes, namespace: Namespace) -> TenantKey:
    return TenantKey(key_id, _derive(master, b"kvkeep tenant key 1" + namespace, KEY_BYTES))


def _derive(master: bytes, info: bytes, length: int) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(algorithm=SHA256(), length=length, salt=None, info=info).derive(master)


def read_key_file(path: Path) -> bytes:
    """Read one key: ``KEY_BYTES`` bytes, or twice as many hexadecimal digits.

    Raises:
        InputError: The file can't be read, is not a key, or is open to others.
    """
    data = read_private(path, "key file", 2 * KEY_BYTES + 2)
    if len(data) == KEY_BYTES:
        return data
    digits = data.removesuffix(b"\n").removesuffix(b"\r")
    try:
        master = bytes.fromhex(digits.decode("ascii")) if len(digits) == 2 * KEY_BYTES else b""
    except ValueError:
        master = b""
    if len(master) != KEY_BYTES:
        raise InputError(
            f"the key file {path} must hold {KEY_BYTES} bytes or {2 * KEY_BYTES} hexadecimal "
            f"digits: make one with head -c {KEY_BYTES} /dev/urandom"
        )
    return master
