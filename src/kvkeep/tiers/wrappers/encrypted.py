"""Values at rest that only their tenant's key opens: AES-256-GCM, bound to the block key.

    | magic | version | zeros | key id | value length | zeros | nonce | tag | ciphertext |

All before the nonce and the block key are authenticated with the value, so a value that was
changed, cut, or put under another key does not open. What stays visible is the length and the key.

Each value has a nonce of 96 random bits. NIST SP 800-38D allows 2^32 of those under one key; a key
is for one namespace, so the limit is 2^32 blocks of one model and tenant (16 PiB at 4 MiB each)
until the master key is changed.
"""

import os
import struct
from collections.abc import Sequence

from kvkeep.model.errors import InputError
from kvkeep.model.ids import BlockKey
from kvkeep.tiers.base import Parts, Tier, length_of
from kvkeep.tiers.wrappers.key_ring import KEY_ID_BYTES, Keys, TenantKey
from kvkeep.tiers.wrappers.wrapper import Checking, in_steps, leading, unset_bytes

_BOUND = struct.Struct(f"<4sHxx{KEY_ID_BYTES}sQ12x")
"""Magic, version, key id, length and zeros: authenticated, not secret."""
_SEAL = struct.Struct("<12s16s")
"""Nonce and tag."""
HEADER_BYTES = _BOUND.size + _SEAL.size
NONCE_BYTES = 12
MAGIC = b"kvke"
VERSION = 1

TRUNCATED = "truncated"
WRONG_FORMAT = "wrong_format"
WRONG_LENGTH = "wrong_length"
UNKNOWN_KEY = "unknown_key"
NOT_AUTHENTIC = "not_authentic"
REASONS = (TRUNCATED, WRONG_FORMAT, WRONG_LENGTH, UNKNOWN_KEY, NOT_AUTHENTIC, "no_key")


class EncryptedTier(Checking):
    """A tier whose inner tier sees ciphertext only.

    A value that does not open is a miss, counted by reason, and deleted. Of a namespace without a
    key nothing is written, read or deleted: that is counted as ``no_key``. A value is copied once
    each way, as the caller's memory may not be changed.
    """

    overhead_bytes = HEADER_BYTES
    """What each value is longer by in the inner tier."""

    def __init__(self, inner: Tier, keys: Keys) -> None:
        """Wrap a tier.

        Raises:
            InputError: The package for encryption is not installed.
        """
        super().__init__(inner, REASONS)
        self._tenant_keys = keys
        try:
            import cryptography.hazmat.primitives.ciphers  # noqa: F401
        except ImportError as error:
            raise InputError(
                "cryptography is not installed: pip install kvkeep[encryption]"
            ) from error

    def write(self, keys: Sequence[BlockKey], values: Sequence[Parts]) -> list[bool]:
        """Encrypt copies and write them."""
        kept: list[bool] = []
        for step in in_steps([length_of(value) for value in values]):
            kept += self._write_step(keys[step], values[step])
        return kept

    def _write_step(self, keys: Sequence[BlockKey], values: Sequence[Parts]) -> list[bool]:
        kept = [False] * len(keys)
        tenants = [self._tenant_keys.find_writing(key.namespace) for key in keys]
        able = [(idx, tenant) for idx, tenant in enumerate(tenants) if tenant is not None]
        self._count("no_key", len(keys) - len(able))
        sealed = [_seal(keys[idx], tenant, values[idx]) for idx, tenant in able]
        answers = self._inner.write([keys[idx] for idx, _ in able], sealed)
        for (idx, _), is_kept in zip(able, answers, strict=True):
            kept[idx] = is_kept
        return kept

    def read(self, keys: Sequence[BlockKey], into: Sequence[Parts]) -> list[int | None]:
        """Read ciphertext and decrypt it into the caller's room."""
        found: list[int | None] = []
        for step in in_steps([length_of(room) for room in into]):
            found += self._read_step(keys[step], into[step])
        return found

    def _read_step(self, keys: Sequence[BlockKey], into: Sequence[Parts]) -> list[int | None]:
        found: list[int | None] = [None] * len(keys)
        sealed = [unset_bytes(HEADER_BYTES + length_of(room)) for room in into]
        lengths = self._inner.read(keys, [[room] for room in sealed])
        wrong: list[tuple[BlockKey, str]] = []
        for idx, (key, length) in enumerate(zip(keys, lengths, strict=True)):
            if length is None:
                continue
            opened = self._open(key, sealed[idx][:length], into[idx])
            if isinstance(opened, int):
                found[idx] = opened
            elif opened == UNKNOWN_KEY and self._tenant_keys.find_writing(key.namespace) is None:
                # Another's value, in whose place nothing readable could be written from here.
                self._count("no_key")
            else:
                wrong.append((key, opened))
        self._reject(wrong)
        return found

    def _open(self, key: BlockKey, data: memoryview, room: Parts) -> int | str:
        """Decrypt one value into its room; what is wrong with it if it does not open."""
        if data.nbytes < HEADER_BYTES:
            return TRUNCATED
        magic, version, key_id, value_bytes = _BOUND.unpack_from(data)
        if (magic, version) != (MAGIC, VERSION):
            return WRONG_FORMAT
        if value_bytes != data.nbytes - HEADER_BYTES:
            return WRONG_LENGTH
        tenant = self._tenant_keys.find_reading(key.namespace, key_id)
        if tenant is None:
            return UNKNOWN_KEY
        is_authentic = _decrypt(key, tenant, data, leading(room, value_bytes))
        return value_bytes if is_authentic else NOT_AUTHENTIC


def _bound_to(key: BlockKey, bound: bytes) -> bytes:
    return bound + key.namespace + key.block_hash + key.group_idx.to_bytes(2, "little")


def _seal(key: BlockKey, tenant: TenantKey, value: Parts) -> Parts:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    bound = _BOUND.pack(MAGIC, VERSION, tenant.key_id, length_of(value))
    nonce = os.urandom(NONCE_BYTES)
    encryptor = Cipher(algorithms.AES(tenant.key), modes.GCM(nonce)).encryptor()
    encryptor.authenticate_additional_data(_bound_to(key, bound))
    ciphertext = unset_bytes(length_of(value))
    done = 0
    for part in leading(value, ciphertext.nbytes):
        done += encryptor.update_into(part, ciphertext[done:])
    encryptor.finalize()
    return [memoryview(bound + _SEAL.pack(nonce, encryptor.tag)), ciphertext]


def _decrypt(key: BlockKey, tenant: TenantKey, data: memoryview, room: Parts) -> bool:
    """Whether the value is authentic; what it says is in the room then, and undefined if not."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    nonce, tag = _SEAL.unpack_from(data, _BOUND.size)
    decryptor = Cipher(algorithms.AES(tenant.key), modes.GCM(nonce, tag)).decryptor()
    decryptor.authenticate_additional_data(_bound_to(key, bytes(data[: _BOUND.size])))
    rest = data[HEADER_BYTES:]
    for part in room:
        decryptor.update_into(rest[: part.nbytes], part)
        rest = rest[part.nbytes :]
    try:
        decryptor.finalize()
    except InvalidTag:
        return False
    return True
