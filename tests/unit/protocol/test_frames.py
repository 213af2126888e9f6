"""Lengths on a stream; how it is cut is in tests/property/test_codec.py."""

import pytest

from kvkeep.model.errors import InputError
from kvkeep.protocol.frames import FRAME_BYTES_MAX, FrameReader, frame


def test_a_frame_is_a_length_and_the_bytes() -> None:
    """The length is four bytes, little-endian, and does not count itself."""
    assert frame(b"abc") == b"\x03\0\0\0abc"


def test_the_largest_frame_goes_through() -> None:
    """A frame of exactly the limit is written and read; one byte more is refused."""
    payload = bytes(FRAME_BYTES_MAX)

    assert FrameReader().feed(frame(payload)) == [payload]
    with pytest.raises(InputError, match="too large"):
        frame(payload + b"\0")


def test_what_is_not_complete_waits() -> None:
    """A frame comes out with its last byte, not before."""
    reader = FrameReader()

    assert reader.feed(frame(b"one") + frame(b"two")[:-1]) == [b"one"]
    assert reader.feed(b"o") == [b"two"]


def test_an_empty_frame_is_a_frame() -> None:
    """A length of zero is an empty message; what that means is for the codec to say."""
    assert FrameReader().feed(frame(b"")) == [b""]
