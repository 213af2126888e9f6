"""Fewer bytes inside, the same bytes outside, and no frame that takes more than its room."""

import struct
from collections.abc import Callable

import numpy as np
import pytest
import zstandard

from kvkeep.model.errors import CorruptDataError, InputError
from kvkeep.testing.tier_contract import block_key, in_parts, read, value_bytes, write
from kvkeep.tiers.memory import MemoryTier
from kvkeep.tiers.wrappers import compressed
from kvkeep.tiers.wrappers.codecs import ZstdCodec
from kvkeep.tiers.wrappers.compressed import HEADER_BYTES, CompressedTier

LENGTH = 40_001


def bfloat16_bytes(length: int) -> bytes:
    """Normal random numbers as bfloat16: the leading halves of float32."""
    numbers = np.random.default_rng(1).normal(size=length // 2 + 1).astype(np.float32)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()[:length]


VALUE = bfloat16_bytes(LENGTH)


@pytest.fixture
def inner() -> MemoryTier:
    """Where the frames lie."""
    return MemoryTier(1 << 20)


@pytest.fixture
def tier(inner: MemoryTier) -> CompressedTier:
    """The tier under test, with one value in it that shrinks."""
    tier = CompressedTier(inner, ZstdCodec())
    assert tier.write([block_key(1)], [in_parts(VALUE, 128)]) == [True]
    return tier


def stored(inner: MemoryTier) -> bytearray:
    """What the inner tier has under the key of the value."""
    (found,) = read(inner, [block_key(1)], LENGTH + HEADER_BYTES)
    assert found is not None
    return bytearray(found)


def put(inner: MemoryTier, data: bytes | bytearray) -> None:
    inner.write([block_key(1)], [in_parts(data)])


def test_numbers_shrink_and_come_back(tier: CompressedTier, inner: MemoryTier) -> None:
    """Two bytes a number, the high ones apart: a quarter less, bit for bit the same."""
    assert len(stored(inner)) < 0.78 * LENGTH
    assert read(tier, [block_key(1)], LENGTH) == [VALUE]
    assert tier.counts()["values_shrunk"] == 1


@pytest.mark.parametrize("element_bytes", [1, 2, 4, 8])
@pytest.mark.parametrize("length", [1, 7, 8, 4096, 4099])
def test_any_length_and_element_comes_back(
    inner: MemoryTier, element_bytes: int, length: int
) -> None:
    """What is over behind the last whole element is kept; another setting reads it too."""
    value = (b"abcdefgh" * 600)[:length]
    CompressedTier(inner, ZstdCodec(element_bytes)).write([block_key(1)], [in_parts(value)])

    assert read(CompressedTier(inner, ZstdCodec(3)), [block_key(1)], LENGTH) == [value]


def test_what_does_not_shrink_is_stored_as_it_is(tier: CompressedTier, inner: MemoryTier) -> None:
    """Random bytes stand behind the header, unchanged."""
    write(tier, [1], LENGTH)

    assert stored(inner)[HEADER_BYTES:] == value_bytes(1, LENGTH)
    assert tier.counts()["values_plain"] == 1


def test_an_empty_value_is_a_value(tier: CompressedTier) -> None:
    """No bytes, no frame, no miss."""
    tier.write([block_key(2)], [[]])

    assert read(tier, [block_key(2)], 10) == [b""]


def test_a_value_without_room_is_a_plain_miss(tier: CompressedTier, inner: MemoryTier) -> None:
    """Though its frame fits; and it stays for readers with more room."""
    assert read(tier, [block_key(1)], LENGTH - 1) == [None]
    assert read(tier, [block_key(1)], LENGTH) == [VALUE]


def flipped(offset: int) -> Callable[[bytearray], bytearray]:
    def flip(data: bytearray) -> bytearray:
        data[offset] ^= 0x11
        return data

    return flip


def with_length(length: int) -> Callable[[bytearray], bytearray]:
    def change(data: bytearray) -> bytearray:
        data[8:16] = struct.pack("<Q", length)
        return data

    return change


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data[: HEADER_BYTES - 1], compressed.TRUNCATED),
        (lambda data: data[:HEADER_BYTES], compressed.BROKEN_FRAME),
        (lambda data: data[:-1], compressed.BROKEN_FRAME),
        (lambda data: data + b"x", compressed.BROKEN_FRAME),
        (flipped(0), compressed.WRONG_FORMAT),
        (flipped(4), compressed.WRONG_FORMAT),
        (flipped(6), compressed.WRONG_FORMAT),
        (flipped(7), compressed.BROKEN_FRAME),
        (flipped(HEADER_BYTES), compressed.BROKEN_FRAME),
        (with_length(LENGTH - 1), compressed.BROKEN_FRAME),
        (with_length(3), compressed.WRONG_LENGTH),
    ],
)
def test_what_cannot_be_undone_is_a_miss(
    tier: CompressedTier,
    inner: MemoryTier,
    spoil: Callable[[bytearray], bytes],
    reason: str,
) -> None:
    """It is counted by its reason and taken out of the tier."""
    put(inner, spoil(stored(inner)))

    assert read(tier, [block_key(1)], LENGTH) == [None]
    assert tier.counts()[reason] == 1
    assert inner.lookup([block_key(1)]) == [False]


@pytest.mark.parametrize("claimed", [LENGTH, 1 << 40])
def test_a_bomb_takes_no_more_than_the_room(
    tier: CompressedTier, inner: MemoryTier, claimed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small frame of a gigabyte of zeros is refused by what it says, before it is undone."""
    frame = zstandard.ZstdCompressor().compressobj(size=1 << 30)
    bomb = frame.compress(bytes(1 << 20))
    header = bytes(stored(inner)[:8]) + struct.pack("<Q", claimed)
    put(inner, header + bomb)
    monkeypatch.setattr(zstandard, "ZstdDecompressor", None)

    assert read(tier, [block_key(1)], LENGTH) == [None]


def test_a_frame_that_says_no_length_is_refused() -> None:
    """The library would guess, and grow."""
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000))

    with pytest.raises(CorruptDataError):
        ZstdCodec().decompress(frame, 1000, 1)


def test_a_frame_of_another_length_is_refused() -> None:
    """Of the length the header names, or of none."""
    frame = ZstdCodec(1).compress(in_parts(bytes(1000)))

    with pytest.raises(CorruptDataError, match="another length"):
        ZstdCodec().decompress(frame, 999, 1)


@pytest.mark.parametrize(("element_bytes", "level"), [(0, 1), (9, 1), (2, 0), (2, 20)])
def test_settings_have_limits(element_bytes: int, level: int) -> None:
    """A setting out of range is refused at once."""
    with pytest.raises(InputError, match="must be"):
        ZstdCodec(element_bytes, level)
