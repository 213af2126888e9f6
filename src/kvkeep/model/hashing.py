"""kvkeep's own chained block hash: equal in every process, on every host, for every vLLM.

vLLM's block hashes depend on a seed per process, on its version and on its hash algorithm
(vllm 0.26, v1/core/kv_cache_utils.py), so nothing is stored under them.

    root    = H(namespace, "kvkeep chain 1", request extras)       keyed with the tenant's secret
    hash[i] = H(hash[i-1], int32 little-endian ids of block i)              keyed likewise
"""

import hashlib
import struct
from array import array
from collections.abc import Mapping, Sequence

from kvkeep.model.ids import HASH_BYTES, BlockHash, Namespace

_CHAIN = b"kvkeep chain 1"
_LENGTH = struct.Struct("<I")
KEY_BYTES_MAX = 64
"""BLAKE2b takes keys of at most 64 bytes (RFC 7693)."""


def _encode_tagged(extras: Mapping[str, str]) -> bytes:
    """Length-prefixed tag and value pairs in tag order: no two mappings share an encoding."""
    parts: list[bytes] = []
    for tag in sorted(extras):
        for text in (tag, extras[tag]):
            data = text.encode()
            parts += (_LENGTH.pack(len(data)), data)
    return b"".join(parts)


class BlockHasher:
    """Extends the hash chain of one sequence as its tokens arrive.

    Invariant: ``hashes[i]`` covers tokens ``0 .. (i + 1) * block_tokens - 1``; a tail shorter than
    a block has no hash.
    """

    __slots__ = ("_block_tokens", "_hashes", "_key", "_parent")

    def __init__(
        self,
        namespace: Namespace,
        block_tokens: int,
        *,
        extras: Mapping[str, str] | None = None,
        secret: bytes = b"",
    ) -> None:
        """Start a chain.

        Args:
            namespace: ``HASH_BYTES`` bytes.
            block_tokens: Tokens per block, at least 1.
            extras: What else decides the KV of every token, by tag: cache salt, LoRA.
            secret: Tenant's key, at most ``KEY_BYTES_MAX`` bytes; without it a hash can't be made.
        """
        if block_tokens < 1:
            raise ValueError(f"block_tokens must be at least 1. block_tokens={block_tokens}")
        if len(namespace) != HASH_BYTES:
            raise ValueError(f"a namespace has {HASH_BYTES} bytes")
        if len(secret) > KEY_BYTES_MAX:
            raise ValueError(f"a tenant's secret has at most {KEY_BYTES_MAX} bytes")
        self._block_tokens = block_tokens
        self._key = secret
        root = _CHAIN + namespace + _LENGTH.pack(block_tokens) + _encode_tagged(extras or {})
        self._parent = self._digest(root)
        self._hashes: list[BlockHash] = []

    def _digest(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=HASH_BYTES, key=self._key).digest()

    @property
    def hashes(self) -> Sequence[BlockHash]:
        """Hashes so far, in the order of the blocks."""
        return self._hashes

    def extend(self, token_ids: Sequence[int]) -> Sequence[BlockHash]:
        """Hash the full blocks of ``token_ids`` that have no hash yet.

        Args:
            token_ids: The whole sequence from its first token, int32 range, ``[num_tokens]``;
                what was hashed before must not have changed.

        Returns:
            All hashes so far.

        Raises:
            OverflowError: A token id does not fit int32; the chain is as before.
        """
        n, start = self._block_tokens, len(self._hashes) * self._block_tokens
        end = len(token_ids) // n * n
        if end <= start:
            return self._hashes
        packed = _pack_ids(token_ids[start:end])
        parent, key, step = self._parent, self._key, n * 4
        blake2b, hashes = hashlib.blake2b, self._hashes
        for offset in range(0, len(packed), step):
            data = parent + packed[offset : offset + step]
            parent = blake2b(data, digest_size=HASH_BYTES, key=key).digest()
            hashes.append(BlockHash(parent))
        self._parent = parent
        return hashes


def _pack_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids as int32 little-endian; x86-64 and AArch64 Linux are little-endian."""
    return array("i", token_ids).tobytes()
