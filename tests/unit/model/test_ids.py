"""Identities refuse what is not one."""

import pytest

from kvkeep.model.ids import HASH_BYTES, BlockHash, BlockKey, Holder, Namespace

NAMESPACE = Namespace(b"n" * HASH_BYTES)
BLOCK_HASH = BlockHash(b"h" * HASH_BYTES)


@pytest.mark.parametrize(
    ("namespace", "block_hash"), [(b"", BLOCK_HASH), (NAMESPACE, b"h" * 31), (b"n" * 33, b"")]
)
def test_a_key_has_whole_digests(namespace: bytes, block_hash: bytes) -> None:
    """A key made of digests of another length is refused."""
    with pytest.raises(ValueError, match="32 bytes"):
        BlockKey(Namespace(namespace), BlockHash(block_hash))


@pytest.mark.parametrize("group_idx", [-1, 0x10000])
def test_a_group_fits_two_bytes(group_idx: int) -> None:
    """A group that the header has no room for is refused."""
    with pytest.raises(ValueError, match="group_idx"):
        BlockKey(NAMESPACE, BLOCK_HASH, group_idx)


def test_keys_are_equal_by_all_their_parts() -> None:
    """Namespace, hash and group together are the identity."""
    key = BlockKey(NAMESPACE, BLOCK_HASH, 1)

    assert key == BlockKey(NAMESPACE, BLOCK_HASH, 1)
    assert len({key, BlockKey(NAMESPACE, BLOCK_HASH, 2), BlockKey(NAMESPACE, BLOCK_HASH)}) == 3


def test_a_key_is_short_for_people() -> None:
    """In messages a key shows the beginning of its digests and the group."""
    assert str(BlockKey(NAMESPACE, BLOCK_HASH, 3)) == "6e6e6e6e/6868686868686868/3"


def test_two_sessions_of_one_process_are_two_holders() -> None:
    """A lease belongs to a session, not to a process."""
    assert Holder(1, 42) != Holder(2, 42)
