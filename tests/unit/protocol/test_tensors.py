"""Tensors as bytes."""

import json
import struct
from typing import Any

import numpy as np
import pytest

from kvkeep.model.errors import InputError
from kvkeep.protocol.tensors import (
    DTYPES,
    HEADER_BYTES_MAX,
    TENSORS_MAX,
    make_header,
    parse_header,
    parse_length,
)


def entry(start: int = 0, end: int = 8, **changes: object) -> dict[str, object]:
    """What a header says of a float32 tensor of two elements."""
    return {"dtype": "F32", "shape": [2], "data_offsets": [start, end]} | changes


def parse(header: object, data_bytes: int = 8) -> list[str]:
    """Names of the tensors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return [place.name for place in parse_header(text, data_bytes)]


def test_a_header_comes_back() -> None:
    """Every dtype, in the order of the bytes."""
    tensors = [(f"t{number}", dtype, (3, number + 1)) for number, dtype in enumerate(DTYPES)]
    header, data_bytes = make_header(tensors, {"made": "here"})

    assert parse_length(header[:8]) == len(header) - 8
    assert len(header) % 8 == 0
    places = parse_header(header[8:], data_bytes)
    assert [(place.name, place.dtype, place.shape) for place in places] == tensors
    assert sum(place.num_bytes for place in places) == data_bytes


def test_the_library_reads_what_is_written_here() -> None:
    """The same bytes, dtypes and shapes."""
    library = pytest.importorskip("safetensors.numpy")
    one, two = np.arange(6, dtype=np.float16).reshape(2, 3), np.arange(4, dtype=np.int8)
    header, _ = make_header([("one", "float16", one.shape), ("two", "int8", two.shape)])

    found = library.load(header + one.tobytes() + two.tobytes())
    assert np.array_equal(found["one"], one)
    assert np.array_equal(found["two"], two)
    assert (found["one"].dtype, found["two"].dtype) == (one.dtype, two.dtype)


def test_what_the_library_writes_is_read_here() -> None:
    """With its metadata, and in its own order."""
    library = pytest.importorskip("safetensors.numpy")
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "b": np.ones((2, 2), np.float32),
        "a": np.ones(3, np.uint8),
    }
    body = library.save(arrays, {"made": "there"})
    start = 8 + parse_length(body)

    places = parse_header(body[8:start], len(body) - start)
    for place in places:
        begin = start + place.start
        assert body[begin : begin + place.num_bytes] == arrays[place.name].tobytes()
    assert {place.name for place in places} == {"a", "b"}


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ({"a": entry(dtype="F64")}, "has dtype 'F64'"),
        ({"a": entry(dtype="I64")}, "has dtype"),
        ({"a": entry(shape=[3])}, "its shape needs 12"),
        ({"a": entry(shape=[-2])}, "can't be read"),
        ({"a": entry(shape=[1 << 60, 1 << 60])}, "can't be read"),
        ({"a": entry(shape=[1 << 40, 1 << 40])}, "its shape needs"),
        ({"a": entry(shape=[])}, "0 dimensions"),
        ({"a": entry(shape=[2] + [1] * 8)}, "9 dimensions"),
        ({"a": entry(shape=[2.0])}, "can't be read"),
        ({"a": entry(4, 12)}, "does not begin"),
        ({"a": entry(8, 0)}, "has -8 bytes"),
        ({"a": entry(), "b": entry(4, 12)}, "does not begin"),
        ({"a": entry(), "b": entry(16, 24)}, "does not begin"),
        ({"a": entry(), "b": entry(8, 16)}, "promises 16 bytes"),
        ({"a": entry(extra=1)}, "can't be read"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "can't be read"),
        ({"a": 1}, "can't be read"),
        ({}, "0 tensors"),
        ({"__metadata__": {"a": 1}, "a": entry()}, "can't be read"),
        ([], "can't be read"),
        (b"{", "can't be read"),
        (b"\xff\xfe", "can't be read"),
        (b"[" * 100_000, "can't be read"),
        (b'{"a":' * 20_000, "can't be read"),
        ({f"t{number}": entry(0, 0, shape=[0]) for number in range(TENSORS_MAX + 1)}, "tensors"),
    ],
)
def test_any_other_header_is_refused(header: object, complaint: str) -> None:
    """In one sentence that says what is wrong."""
    with pytest.raises(InputError, match=complaint) as caught:
        parse(header)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_name_that_stands_twice_can_hide_nothing() -> None:
    """The last one counts, and the bytes of the first would be a gap."""
    one, two = (json.dumps(entry(start, start + 8)) for start in (0, 8))
    with pytest.raises(InputError, match="does not begin"):
        parse(f'{{"a": {one}, "a": {two}}}'.encode(), 16)


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES_MAX + 1, (1 << 64) - 1])
def test_a_length_that_can_not_be_is_refused(length: int) -> None:
    """Before anything is read on its word."""
    with pytest.raises(InputError, match="its header would have"):
        parse_length(struct.pack("<Q", length))


def test_a_body_without_a_length_is_refused() -> None:
    """Seven bytes are none."""
    with pytest.raises(InputError, match="too short"):
        parse_length(b"1234567")


def test_only_what_can_be_read_is_written() -> None:
    """Neither too many tensors nor a dtype that is not taken."""
    with pytest.raises(InputError, match="too many"):
        make_header([(f"t{number}", "int8", (1,)) for number in range(TENSORS_MAX + 1)])
    with pytest.raises(InputError, match="dtype float64"):
        make_header([("a", "float64", (1,))])
