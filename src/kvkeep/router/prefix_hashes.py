"""The chained hashes by which a prompt's beginning is recognized: of token blocks, or of text.

A hash stands for a block and everything before it. It says where a prefix probably lies, never what
a block contains: a collision costs a request one worse choice of endpoint. Hence a fast unkeyed
hash, and nothing to do with the block hashes under which kvkeep stores.
"""

from array import array
from collections.abc import Sequence

import xxhash

HASH_MASK = (1 << 60) - 1
"""Python keeps an integer below 2**60 in 32 bytes and a larger one in 48, and an index holds
millions. Among a million blocks two collide with a chance of one in two million."""

TEXT_BLOCK_BYTES = 256
"""Some 64 tokens of English: fine enough to tell conversations apart, coarse enough that a long
prompt is some hundred hashes."""

_TEXT_ROOT = 0x7465_7874
_TOKEN_ROOT = 0x746F_6B65_6E73


def text_hashes(text: bytes) -> list[int]:
    """Hash the full blocks of ``TEXT_BLOCK_BYTES`` of a text, each chained to the one before."""
    parent, hashes = _TEXT_ROOT, []
    # The view is cut without copying.
    view = memoryview(text)
    for start in range(0, len(text) - TEXT_BLOCK_BYTES + 1, TEXT_BLOCK_BYTES):
        block = view[start : start + TEXT_BLOCK_BYTES]
        parent = xxhash.xxh3_64_intdigest(block, seed=parent) & HASH_MASK
        hashes.append(parent)
    return hashes


def token_root(lora_name: str | None = None) -> int:
    """Return the parent of a first block: another one for each LoRA, whose KV differs."""
    if not lora_name:
        return _TOKEN_ROOT
    return xxhash.xxh3_64_intdigest(lora_name.encode(), seed=_TOKEN_ROOT) & HASH_MASK


def token_hashes(
    token_ids: Sequence[int],
    block_tokens: int,
    parent: int,
    extra_keys: Sequence[bytes | None] = (),
) -> list[int]:
    """Hash the full blocks of a sequence of tokens, each chained to the one before.

    Args:
        token_ids: Ids from 0 to 2**32 - 1.
        block_tokens: Tokens per block.
        parent: Hash of the block before the first, or ``token_root``.
        extra_keys: What decides each block's KV besides its tokens, by block; an engine reports it
            of media and of salted prompts. Blocks beyond its end have none.

    Raises:
        OverflowError: An id is out of range.
    """
    tokens = memoryview(array("I", token_ids).tobytes())
    block_bytes = 4 * block_tokens
    hashes = []
    for idx in range(len(token_ids) // block_tokens):
        extra = extra_keys[idx] if idx < len(extra_keys) else None
        if extra is not None:
            parent = xxhash.xxh3_64_intdigest(extra, seed=parent)
        block = tokens[idx * block_bytes : (idx + 1) * block_bytes]
        parent = xxhash.xxh3_64_intdigest(block, seed=parent) & HASH_MASK
        hashes.append(parent)
    return hashes


def salt_key(cache_salt: str) -> bytes:
    """Return the extra key of the first block of a salted prompt."""
    return b"salt\0" + cache_salt.encode()
