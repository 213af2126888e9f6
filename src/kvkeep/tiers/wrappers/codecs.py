"""Lossless compression of a block's bytes, with the bytes of equal weight side by side.

The high bytes of bfloat16 numbers (sign and most of the exponent) repeat, the low bytes (mantissa)
hardly do. Interleaved, neither does; apart, the high bytes shrink to a third.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvkeep.model.errors import CorruptDataError, InputError
from kvkeep.tiers.base import Parts

ELEMENT_BYTES_MAX = 8


class ZstdCodec:
    """Zstandard, after laying the bytes of each element apart. Thread-safe: it never changes."""

    def __init__(self, element_bytes: int = 2, level: int = 1) -> None:
        """Compress numbers of ``element_bytes`` bytes (1: bytes as they are), fastest level first.

        Raises:
            InputError: The package is not installed, or a setting is out of range.
        """
        if not 1 <= element_bytes <= ELEMENT_BYTES_MAX:
            raise InputError(f"element_bytes must be 1 to {ELEMENT_BYTES_MAX}, not {element_bytes}")
        if not 1 <= level <= 19:
            raise InputError(f"the compression level must be 1 to 19, not {level}")
        self.element_bytes = element_bytes
        self.level = level
        self._zstd = _zstandard()

    def compress(self, value: Parts) -> bytes:
        """One frame that says how long the value is."""
        data = _apart(_joined([part for part in value if part.nbytes]), self.element_bytes)
        return bytes(self._zstd.ZstdCompressor(level=self.level).compress(data))

    def decompress(self, data: bytes, length: int, element_bytes: int) -> memoryview:
        """The value of ``length`` bytes; allocates about twice that and never more.

        Raises:
            CorruptDataError: The frame is not whole, or is of another length.
        """
        try:
            # A frame may claim any length, and the library would allocate it whatever the limit.
            claimed = self._zstd.frame_content_size(data)
            if claimed != length or not 1 <= element_bytes <= ELEMENT_BYTES_MAX:
                raise CorruptDataError("the frame is of another length or element")
            undo = self._zstd.ZstdDecompressor().decompress
            plain = undo(data, max_output_size=length, allow_extra_data=False)
        except self._zstd.ZstdError as error:
            raise CorruptDataError(f"the frame can't be decompressed: {error}") from error
        if len(plain) != length:
            raise CorruptDataError("the frame is of another length")
        return _together(np.frombuffer(plain, dtype=np.uint8), element_bytes)


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise InputError("zstandard is not installed: pip install kvkeep[compression]") from error
    return zstandard


def _joined(value: Sequence[memoryview]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if len(value) == 1:
        return np.frombuffer(value[0], dtype=np.uint8)
    return np.concatenate([np.frombuffer(part, dtype=np.uint8) for part in value])


def _apart(data: np.ndarray[Any, np.dtype[np.uint8]], element_bytes: int) -> memoryview:
    """First bytes of all elements, then all second bytes, ...; what is over stays at the end."""
    if element_bytes == 1:
        return data.data
    whole = len(data) // element_bytes * element_bytes
    laid = np.empty_like(data)
    for idx, plane in enumerate(laid[:whole].reshape(element_bytes, -1)):
        plane[:] = data[idx:whole:element_bytes]
    laid[whole:] = data[whole:]
    return laid.data


def _together(laid: np.ndarray[Any, np.dtype[np.uint8]], element_bytes: int) -> memoryview:
    """Undo ``_apart``."""
    if element_bytes == 1:
        return laid.data
    whole = len(laid) // element_bytes * element_bytes
    data = np.empty_like(laid)
    # One plane after the other: a transposed copy takes ten times as long.
    for idx, plane in enumerate(laid[:whole].reshape(element_bytes, -1)):
        data[idx:whole:element_bytes] = plane
    data[whole:] = laid[whole:]
    return data.data
