"""Bodies of requests for sequences: layers, or one sentence, and never more memory than bytes."""

import asyncio
import json
import struct
from typing import Any

import pytest
from aiohttp import StreamReader
from aiohttp.base_protocol import BaseProtocol
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.core.sequences import LayerKv
from kvkeep.daemon.sequences.bodies import lay_out, receive
from kvkeep.model.errors import InputError
from kvkeep.protocol.tensors import make_header, parse_header, parse_length
from tests.property.fuzz.damage import NUMBERS, costing_at_most, damaged, examples

SHAPE = (3, 2, 4)
NAMES = ("layers.0.key", "layers.0.value", "layers.7.key", "layers.7.value")
HEADER, DATA_BYTES = make_header([(name, "bfloat16", SHAPE) for name in NAMES])
GOOD = HEADER + bytes(range(DATA_BYTES % 256)) + bytes(DATA_BYTES - DATA_BYTES % 256)
COST_BYTES = 1 << 20
"""Of reading a few hundred bytes, whatever they say; a tensor of a few MiB would be found."""


def received(body: bytes, said_bytes: int | None = None) -> dict[int, LayerKv]:
    """What a daemon makes of a body, which came with this Content-Length."""

    async def receive_it() -> dict[int, LayerKv]:
        loop = asyncio.get_running_loop()
        content = StreamReader(BaseProtocol(loop), 1 << 16, loop=loop)
        content.feed_data(body)
        content.feed_eof()
        return await receive(content, len(body) if said_bytes is None else said_bytes)

    return asyncio.run(receive_it())


def is_taken(body: bytes) -> bool:
    """Whether a body is layers; whatever is taken comes out as the bytes that came in."""
    try:
        layers = received(body)
    except InputError as error:
        return _refuses_in_one_sentence(error)
    header, num_bytes, pieces = lay_out(layers)
    data = b"".join(pieces)
    assert len(data) == num_bytes == len(body) - 8 - parse_length(body)
    again = received(header + data)
    assert {idx: _bytes_of(layer) for idx, layer in again.items()} == {
        idx: _bytes_of(layer) for idx, layer in layers.items()
    }
    return True


def _refuses_in_one_sentence(error: InputError) -> bool:
    assert 10 < len(str(error)) < 500
    assert "\n" not in str(error)
    return False


def _bytes_of(layer: LayerKv) -> tuple[bytes, bytes]:
    return b"".join(layer.key.pieces), b"".join(layer.value.pieces)


def test_a_good_body_is_taken() -> None:
    """So that what follows is about the damage."""
    assert is_taken(GOOD)


@given(body=st.binary(max_size=300) | damaged(GOOD))
@examples(400)
def test_any_bytes_are_layers_or_refused(body: bytes) -> None:
    """Nothing else is raised, and little memory taken."""
    with costing_at_most(COST_BYTES):
        is_taken(body)


JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F64", "BOOL"]) | JSON,
        "shape": st.lists(st.integers(0, 4) | NUMBERS, max_size=4) | JSON,
        "data_offsets": st.tuples(NUMBERS | st.integers(0, 64), NUMBERS | st.integers(0, 64))
        | JSON,
    }
)


@given(
    header=st.dictionaries(st.sampled_from([*NAMES, "__metadata__", "x"]), ENTRY | JSON),
    data=st.binary(max_size=64),
)
@examples(150)
def test_any_header_is_layers_or_refused(header: dict[str, Any], data: bytes) -> None:
    """Hostile numbers, other types, deep nesting: no memory is taken on their word."""
    text = json.dumps(header).encode()
    with costing_at_most(COST_BYTES):
        is_taken(struct.pack("<Q", len(text)) + text + data)


@given(body=damaged(GOOD))
@examples(300)
def test_the_library_finds_no_other_tensors(body: bytes) -> None:
    """What is taken here the library reads too, with the same bytes in the same places."""
    library = pytest.importorskip("safetensors")
    try:
        length = parse_length(body)
        places = parse_header(body[8 : 8 + length], len(body) - 8 - length)
    except InputError:
        return
    found = dict(library.deserialize(body))

    assert {name: (tuple(told["shape"]), bytes(told["data"])) for name, told in found.items()} == {
        place.name: (
            place.shape,
            body[8 + length + place.start : 8 + length + place.start + place.num_bytes],
        )
        for place in places
    }


@pytest.mark.parametrize("num_bytes", [0, 7, 8, 20, len(HEADER), len(GOOD) - 1])
def test_a_body_that_breaks_off_is_refused(num_bytes: int) -> None:
    """Wherever it ends, and whatever length it was said to have."""
    for said_bytes in (num_bytes, len(GOOD), 1 << 40):
        with pytest.raises(InputError):
            received(GOOD[:num_bytes], said_bytes)


def test_a_promise_takes_no_memory() -> None:
    """A body of 1 TiB whose first bytes have come costs what has come."""
    header, num_bytes = make_header([(name, "float32", (1 << 20, 64, 1024)) for name in NAMES[:2]])
    with costing_at_most(COST_BYTES), pytest.raises(InputError, match="too soon"):
        received(header + bytes(1000), len(header) + num_bytes)
