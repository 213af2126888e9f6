"""The header in front of a slot, and its check."""

import pytest

from kvkeep.model.ids import BlockHash, BlockKey, Namespace
from kvkeep.tiers.slot_header import (
    DIGEST_BYTES,
    HEADER_BYTES,
    SlotHeader,
    SlotState,
    pack_header,
    unpack_header,
)

KEY = BlockKey(Namespace(bytes(range(32))), BlockHash(bytes(range(100, 132))), 3)
DIGESTS = bytes(range(2 * DIGEST_BYTES))


def header(state: SlotState, key: BlockKey | None = KEY) -> SlotHeader:
    """A header with a different value in every field."""
    return SlotHeader(state, 7, 11, 8192, key, 4242, 99)


@pytest.mark.parametrize("state", [SlotState.WRITING, SlotState.READY])
def test_a_header_comes_back_as_it_was_written(state: SlotState) -> None:
    """Every field survives, and the header has its fixed length."""
    packed = pack_header(header(state), DIGESTS)

    assert len(packed) == HEADER_BYTES
    assert unpack_header(packed + DIGESTS) == header(state)


def test_a_free_slot_has_no_key() -> None:
    """A free slot's zeros are not taken for a block's name."""
    packed = pack_header(header(SlotState.FREE, None))

    found = unpack_header(packed + DIGESTS)
    assert found is not None
    assert found.key is None


def test_any_flipped_bit_of_a_ready_slot_is_found() -> None:
    """No bit of a header, nor of the digests behind it, can turn over unnoticed."""
    data = bytearray(pack_header(header(SlotState.READY), DIGESTS) + DIGESTS)
    unnoticed = []
    for bit_idx in range(len(data) * 8):
        data[bit_idx // 8] ^= 1 << (bit_idx % 8)
        if unpack_header(bytes(data)) is not None:
            unnoticed.append(bit_idx)
        data[bit_idx // 8] ^= 1 << (bit_idx % 8)

    assert unpack_header(bytes(data)) == header(SlotState.READY)
    assert unnoticed == []


def test_a_writer_may_change_digests_of_a_slot_that_is_not_ready() -> None:
    """While a slot is written its digests come and go; a recovery still knows its writer."""
    packed = pack_header(header(SlotState.WRITING), DIGESTS)

    assert unpack_header(packed + b"\xff" * len(DIGESTS)) == header(SlotState.WRITING)


def test_digests_of_another_block_do_not_fit() -> None:
    """A ready slot's header accepts no digests but those it was committed with."""
    packed = pack_header(header(SlotState.READY), DIGESTS)

    assert unpack_header(packed + DIGESTS[::-1]) is None


@pytest.mark.parametrize("data", [bytes(HEADER_BYTES), b"\xff" * HEADER_BYTES])
def test_what_was_never_written_is_no_header(data: bytes) -> None:
    """Fresh memory is not mistaken for a slot."""
    assert unpack_header(data + DIGESTS) is None
