"""What a chain of block hashes refuses; its properties are in tests/property/test_hashing.py."""

import pytest

from kvkeep.model.hashing import KEY_BYTES_MAX, BlockHasher
from kvkeep.model.ids import Namespace

NAMESPACE = Namespace(b"n" * 32)


def test_a_block_has_tokens() -> None:
    """A block of no tokens is refused."""
    with pytest.raises(ValueError, match="block_tokens"):
        BlockHasher(NAMESPACE, 0)


def test_a_namespace_has_32_bytes() -> None:
    """A namespace of another length is refused."""
    with pytest.raises(ValueError, match="namespace"):
        BlockHasher(Namespace(b"n"), 16)


def test_a_secret_has_a_limit() -> None:
    """A secret longer than the hash takes is refused, not cut."""
    BlockHasher(NAMESPACE, 16, secret=b"s" * KEY_BYTES_MAX)
    with pytest.raises(ValueError, match="secret"):
        BlockHasher(NAMESPACE, 16, secret=b"s" * (KEY_BYTES_MAX + 1))


def test_a_tail_has_no_hash() -> None:
    """Tokens that don't fill a block wait for more."""
    hasher = BlockHasher(NAMESPACE, 4)

    assert len(hasher.extend([1, 2, 3])) == 0
    assert len(hasher.extend([1, 2, 3, 4, 5])) == 1
    assert len(hasher.hashes) == 1


def test_a_shorter_sequence_takes_nothing_back() -> None:
    """Asking again with fewer tokens gives the hashes there are."""
    hasher = BlockHasher(NAMESPACE, 2)
    hashes = list(hasher.extend([1, 2, 3, 4]))

    assert list(hasher.extend([1, 2])) == hashes
