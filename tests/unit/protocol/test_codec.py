"""The bytes of known messages: a change here is a change of the wire format."""

import pytest

from kvkeep.model.errors import InputError
from kvkeep.protocol import codec
from kvkeep.protocol import messages as m


def test_a_message_is_an_array_that_begins_with_its_tag() -> None:
    """Ping 7 is the array [7, 7] in a frame of two bytes and a header."""
    assert codec.encode(m.Ping(7)) == b"\x03\0\0\0\x92\x07\x07"


def test_what_was_left_out_of_a_short_message_is_the_default() -> None:
    """Counts that a Release does not carry are zero."""
    assert codec.decode_to_daemon(b"\x92\x03\x91\x05") == m.Release([5], 0, 0, 0)


def test_a_message_for_the_other_side_is_refused() -> None:
    """A daemon does not take what only a client may be told."""
    with pytest.raises(InputError, match="not a message to the daemon"):
        codec.decode_to_daemon(b"\x92\x6a\x07")
    with pytest.raises(InputError, match="not a message to a client"):
        codec.decode_to_client(b"\x92\x07\x07")


def test_slots_are_four_bytes_each() -> None:
    """Slots are little-endian, and no slot is the largest number."""
    assert codec.join_slots([1, 0xFFFFFFFF]) == b"\x01\0\0\0\xff\xff\xff\xff"
    with pytest.raises(InputError, match="4 bytes"):
        codec.split_slots(b"\0\0\0")


def test_hashes_are_32_bytes_each() -> None:
    """A list of hashes that breaks off is refused."""
    with pytest.raises(InputError, match="32 bytes"):
        codec.split_hashes(b"h" * 33)
