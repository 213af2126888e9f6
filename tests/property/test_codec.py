"""The wire format: what goes in comes out, and nothing a peer can send does harm."""

import struct
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, get_args
from unittest import mock

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.model.errors import InputError
from kvkeep.model.ids import HASH_BYTES, BlockHash
from kvkeep.protocol import codec
from kvkeep.protocol import messages as m
from kvkeep.protocol.frames import FRAME_BYTES_MAX, HEADER_BYTES, FrameReader, frame

TO_DAEMON: tuple[type[m.Message], ...] = get_args(m.ToDaemon)
TO_CLIENT: tuple[type[m.Message], ...] = get_args(m.ToClient)
DECODERS: list[Callable[[bytes], m.Message]] = [codec.decode_to_daemon, codec.decode_to_client]
LIST_MAX = 40
"""Elements drawn at most; the limits of the messages themselves are tested one by one."""


def values_of(kind: msgspec.inspect.Type) -> st.SearchStrategy[Any]:
    """Every value a field may have, up to ``LIST_MAX`` elements, from the field's own limits."""
    match kind:
        case msgspec.inspect.IntType(ge=low, le=high):
            return st.integers(low, high)
        case msgspec.inspect.FloatType(ge=low, le=high):
            return st.floats(low, high)
        case msgspec.inspect.BytesType(min_length=low, max_length=high):
            return st.binary(min_size=low or 0, max_size=max(low or 0, min(high or 64, 64)))
        case msgspec.inspect.StrType():
            return st.text(st.characters(exclude_categories=["Cs"]), max_size=LIST_MAX)
        case msgspec.inspect.BoolType():
            return st.booleans()
        case msgspec.inspect.NoneType():
            return st.none()
        case msgspec.inspect.ListType(item_type=item):
            return st.lists(values_of(item), max_size=LIST_MAX)
        case msgspec.inspect.LiteralType(values=values):
            return st.sampled_from(values)
        case msgspec.inspect.UnionType(types=types):
            return st.one_of([values_of(each) for each in types])
        case msgspec.inspect.StructType(cls=cls, fields=fields):
            return st.builds(cls, **{field.name: values_of(field.type) for field in fields})
    raise NotImplementedError(f"no values known for {kind}")


def messages_of(kinds: Sequence[type[m.Message]]) -> st.SearchStrategy[m.Message]:
    return st.one_of([values_of(msgspec.inspect.type_info(kind)) for kind in kinds])


ANY_MESSAGE = messages_of([*TO_DAEMON, *TO_CLIENT])


def payload_of(message: m.Message) -> bytes:
    (payload,) = FrameReader().feed(codec.encode(message))
    return payload


def refused_or_exact(payload: bytes) -> None:
    """Bytes are refused with InputError, or are a message whose own bytes mean the same."""
    for decode in DECODERS:
        try:
            message = decode(payload)
        except InputError:
            continue
        assert decode(payload_of(message)) == message


# ---- round trip


@pytest.mark.parametrize("kind", TO_DAEMON, ids=lambda kind: kind.__name__)
@given(data=st.data())
@settings(max_examples=40)
def test_a_message_to_the_daemon_comes_back(kind: type[m.Message], data: st.DataObject) -> None:
    """Whatever a client may say arrives as it was said, and is no message to a client."""
    message = data.draw(messages_of([kind]))
    payload = payload_of(message)

    assert codec.decode_to_daemon(payload) == message
    with pytest.raises(InputError):
        codec.decode_to_client(payload)


@pytest.mark.parametrize("kind", TO_CLIENT, ids=lambda kind: kind.__name__)
@given(data=st.data())
@settings(max_examples=40)
def test_a_message_to_a_client_comes_back(kind: type[m.Message], data: st.DataObject) -> None:
    """Whatever the daemon may say arrives as it was said, and is no message to a daemon."""
    message = data.draw(messages_of([kind]))
    payload = payload_of(message)

    assert codec.decode_to_client(payload) == message
    with pytest.raises(InputError):
        codec.decode_to_daemon(payload)


@given(st.lists(st.binary(min_size=HASH_BYTES, max_size=HASH_BYTES), max_size=100))
def test_joined_hashes_come_apart(hashes: list[bytes]) -> None:
    """Joining and splitting hashes changes nothing."""
    blocks = [BlockHash(each) for each in hashes]

    assert codec.split_hashes(codec.join_hashes(blocks)) == blocks


@given(st.lists(st.integers(0, 2**32 - 1), max_size=100))
def test_joined_slots_come_apart(slots: list[int]) -> None:
    """Joining and splitting slots changes nothing."""
    assert codec.split_slots(codec.join_slots(slots)) == tuple(slots)


@given(st.binary(max_size=200))
def test_a_broken_list_is_refused(joined: bytes) -> None:
    """Bytes that are no whole number of hashes or slots are refused, all others are split."""
    for split, width in ((codec.split_hashes, HASH_BYTES), (codec.split_slots, 4)):
        if len(joined) % width:
            with pytest.raises(InputError):
                split(joined)
        else:
            assert len(split(joined)) == len(joined) // width


# ---- hostile bytes


@given(st.binary(max_size=300))
@settings(max_examples=500)
def test_any_bytes_are_refused_or_mean_something(payload: bytes) -> None:
    """No bytes make a decoder raise anything but InputError."""
    refused_or_exact(payload)


@given(ANY_MESSAGE, st.data())
@settings(max_examples=500)
def test_a_damaged_message_is_refused_or_means_something(
    message: m.Message, data: st.DataObject
) -> None:
    """Cut, longer or changed bytes of a valid message do no harm."""
    payload = bytearray(payload_of(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(payload)))
        match data.draw(st.sampled_from(["cut", "change", "insert"])):
            case "cut":
                del payload[at:]
            case "change":
                payload[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
            case "insert":
                payload[at:at] = data.draw(st.binary(min_size=1, max_size=9))

    refused_or_exact(bytes(payload))


@given(ANY_MESSAGE, st.data())
def test_a_field_too_many_or_too_few_is_refused(message: m.Message, data: st.DataObject) -> None:
    """A message says exactly what its type has fields for."""
    fields = msgspec.msgpack.decode(payload_of(message))
    longer = msgspec.msgpack.encode([*fields, data.draw(st.integers(0, 9))])

    for decode in DECODERS:
        with pytest.raises(InputError):
            decode(longer)
        with pytest.raises(InputError):
            decode(msgspec.msgpack.encode(fields[:1]))


HUGE = 2**32 - 1
HOSTILE = {
    "empty": b"",
    "reserved byte": b"\xc1",
    "array that claims 2**32 elements": b"\xdd" + struct.pack(">I", HUGE),
    "list field that claims 2**32": b"\x92\x03\xdd" + struct.pack(">I", HUGE),
    "list field at its limit, empty": b"\x92\x03\xdd" + struct.pack(">I", m.HASHES_MAX),
    "list field above its limit": b"\x92\x03\xdd" + struct.pack(">I", m.HASHES_MAX + 1),
    "bytes that claim 2**32": b"\x92\x65\xc6" + struct.pack(">I", HUGE),
    "text that claims 2**32": b"\x94\x01\x01\xdb" + struct.pack(">I", HUGE),
    "map that claims 2**32": b"\x92\x01\xdf" + struct.pack(">I", HUGE),
    "nested arrays": b"\x91" * 100_000,
    "nested arrays in a field": b"\x97\x02\x01" + b"\x91" * 100_000,
    "nested maps": b"\x92\x01" + b"\x81" * 100_000,
    "extension type": b"\xc9\x00\x00\x00\x02\x05ab",
    "text that is no text": b"\x94\x01\x01\xa2\xff\xfe\xa0\xc0",
    "integer above 64 bits' sign": b"\x92\x07\xcf" + b"\xff" * 8,
    "negative id": b"\x92\x07\xff",
    "not a number of seconds": codec.encode(
        m.Acquire(1, b"n" * 32, 0, b"", float("nan"))
    )[HEADER_BYTES:],
    "endless lease": codec.encode(
        m.Acquire(1, b"n" * 32, 0, b"", float("inf"))
    )[HEADER_BYTES:],
    "namespace too short": codec.encode(m.Acquire(1, b"n" * 31, 0, b"", 1.0))[HEADER_BYTES:],
    "too many hashes": codec.encode(
        m.Acquire(1, b"n" * 32, 0, b"h" * (m.HASHES_MAX * HASH_BYTES + 1), 1.0)
    )[HEADER_BYTES:],
    "text too long": codec.encode(m.Hello(1, "r" * (m.TEXT_MAX + 1), "e"))[HEADER_BYTES:],
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_cost_no_memory(name: str) -> None:
    """What claims to be large is refused before memory is taken for it."""
    payload = HOSTILE[name]
    tracemalloc.start()
    try:
        for decode in DECODERS:
            with pytest.raises(InputError):
                decode(payload)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak_bytes < len(payload) + (1 << 20)


# ---- frames


@given(st.lists(st.binary(max_size=50), max_size=10), st.data())
@settings(max_examples=200)
def test_frames_do_not_depend_on_how_the_stream_was_cut(
    payloads: list[bytes], data: st.DataObject
) -> None:
    """However a stream arrives, the same messages come out, and nothing is kept."""
    stream = b"".join(frame(payload) for payload in payloads)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    reader = FrameReader()
    seen = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        seen += reader.feed(stream[start:end])

    assert seen == payloads
    assert not reader._buffer


@given(st.integers(FRAME_BYTES_MAX + 1, 2**32 - 1), st.integers(1, HEADER_BYTES))
def test_a_frame_too_large_is_refused_at_its_length(length: int, cut: int) -> None:
    """The length alone is enough to refuse a frame, in one piece or two."""
    header = struct.pack("<I", length)
    reader = FrameReader()
    if cut < HEADER_BYTES:
        assert reader.feed(header[:cut]) == []

    with pytest.raises(InputError, match="frame too large"):
        reader.feed(header[cut:] if cut < HEADER_BYTES else header)


@given(st.lists(st.binary(max_size=30), max_size=8))
def test_a_reader_keeps_less_than_one_frame(pieces: list[bytes]) -> None:
    """Whatever arrives, between two reads a reader holds less than the largest frame."""
    limit = 20
    reader = FrameReader()
    with mock.patch("kvkeep.protocol.frames.FRAME_BYTES_MAX", limit), suppress(InputError):
        for piece in pieces:
            assert all(len(payload) <= limit for payload in reader.feed(piece))
            assert len(reader._buffer) < HEADER_BYTES + limit


def test_a_claimed_length_takes_no_memory() -> None:
    """A peer that announces the largest frame and sends nothing costs next to nothing."""
    tracemalloc.start()
    try:
        readers = [FrameReader() for _ in range(100)]
        for reader in readers:
            assert reader.feed(struct.pack("<I", FRAME_BYTES_MAX)) == []
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak_bytes < 1 << 20
