"""Tensors as bytes: the safetensors format, read strictly and within bounds.

A body is a length (8 bytes, little-endian), so many bytes of JSON, and the tensors' bytes one
after another. The JSON names each tensor's dtype, shape and place. Nothing in it is ever executed,
and nothing is allocated on its word: who reads knows beforehand how many bytes come at most.

Source: the format as https://github.com/huggingface/safetensors describes it (README, *Format*).
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any

import msgspec

from kvkeep.model.errors import InputError

_LENGTH = struct.Struct("<Q")
LENGTH_BYTES = _LENGTH.size
HEADER_BYTES_MAX = 256 << 10
"""Of the JSON: enough for ``TENSORS_MAX`` tensors, and read in about a millisecond."""
TENSORS_MAX = 1024
DIMENSIONS_MAX = 8
ALIGNMENT = 8
"""Where the tensors' bytes begin: the header is filled up with spaces, as the library does."""
METADATA = "__metadata__"

DTYPES = {
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
}
"""Name of a dtype, as torch and ml_dtypes have it, to what safetensors calls it and its bytes."""
_BY_CODE = {code: name for name, (code, _) in DTYPES.items()}

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[Count]
    data_offsets: tuple[Count, Count]


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One tensor of a body."""

    name: str
    dtype: str
    """A key of ``DTYPES``."""
    shape: tuple[int, ...]
    start: int
    """Its first byte, counted from behind the header."""
    num_bytes: int


def parse_length(text: bytes | memoryview) -> int:
    """Bytes of the header that follow these first ``LENGTH_BYTES``.

    Raises:
        InputError: More than ``HEADER_BYTES_MAX``, or none.
    """
    if len(text) < LENGTH_BYTES:
        raise InputError("the body is not safetensors: it is too short")
    (length,) = _LENGTH.unpack_from(text)
    if not 2 <= length <= HEADER_BYTES_MAX:
        raise InputError(
            f"the body is not safetensors: its header would have {length} bytes, "
            f"and 2 to {HEADER_BYTES_MAX} are taken"
        )
    return int(length)


def parse_header(text: bytes | memoryview, data_bytes: int) -> list[TensorPlace]:
    """Read the JSON of a header.

    Args:
        text: The JSON alone.
        data_bytes: How many bytes follow it.

    Returns:
        The tensors in the order of their bytes. They fill ``data_bytes`` without gap or overlap.

    Raises:
        InputError: It is anything else than that.
    """
    try:
        entries = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        msgspec.json.decode(entries.pop(METADATA, b"{}"), type=dict[str, str])
        if not 1 <= len(entries) <= TENSORS_MAX:
            raise InputError(f"the body holds {len(entries)} tensors: send 1 to {TENSORS_MAX}")
        places = [
            _place(name, msgspec.json.decode(raw, type=_Entry)) for name, raw in entries.items()
        ]
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InputError(
            f"the header of the safetensors body can't be read ({' '.join(str(error).split())})"
        ) from error
    places.sort(key=lambda place: (place.start, place.num_bytes))
    end = 0
    for place in places:
        if place.start != end:
            raise InputError(f"the tensor {_short(place.name)} does not begin where another ends")
        end += place.num_bytes
    if end != data_bytes:
        raise InputError(f"the header promises {end} bytes of tensors and {data_bytes} follow it")
    return places


def _place(name: str, entry: _Entry) -> TensorPlace:
    dtype = _BY_CODE.get(entry.dtype)
    if dtype is None:
        raise InputError(
            f"the tensor {_short(name)} has dtype {_short(entry.dtype)}: "
            f"send one of {', '.join(_BY_CODE)}"
        )
    if not 1 <= len(entry.shape) <= DIMENSIONS_MAX:
        raise InputError(
            f"the tensor {_short(name)} has {len(entry.shape)} dimensions: "
            f"send 1 to {DIMENSIONS_MAX}"
        )
    start, end = entry.data_offsets
    num_bytes = prod(entry.shape) * DTYPES[dtype][1]
    if end - start != num_bytes:
        raise InputError(
            f"the tensor {_short(name)} has {end - start} bytes where its shape needs {num_bytes}"
        )
    return TensorPlace(name, dtype, tuple(entry.shape), start, num_bytes)


def make_header(
    tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, int]:
    """What goes before the tensors' bytes.

    Args:
        tensors: Name, dtype (a key of ``DTYPES``) and shape, in the order of their bytes.
        metadata: Texts that travel along.

    Returns:
        Length and JSON, a multiple of ``ALIGNMENT`` bytes; and how many bytes have to follow.

    Raises:
        InputError: There are too many tensors for one body, or one's dtype is not taken.
    """
    entries: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype} is not taken: choose from {', '.join(DTYPES)}")
        code, item_bytes = DTYPES[dtype]
        start, end = end, end + prod(shape) * item_bytes
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    if len(tensors) > TENSORS_MAX or len(text) > HEADER_BYTES_MAX:
        raise InputError(f"{len(tensors)} tensors are too many for one body: send fewer layers")
    return _LENGTH.pack(len(text)) + text, end


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:80]}...")
