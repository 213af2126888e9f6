"""Head pages as 8-bit whole numbers: about half the bytes of a 16-bit type, and not the same bits.

A page is taken as a plain run of values, in whatever order its backend packs them. Each run of 64
keeps its largest magnitude in the page's own type, and every value as a whole number of 127ths of
that magnitude:

    | int8 [num_values] | largest magnitudes, in the page's own type [num_spans] |

Pure: nothing here knows of pools, engines or digests.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvkeep.model.errors import InputError

SPAN_VALUES: Final = 64
"""Values that share a magnitude: enough that it costs 3 %, few enough that one outlier hurts few.
Part of the form's name, as is every other choice here."""
STEPS: Final = 127
"""Whole numbers on either side of 0."""

Pages = NDArray[np.uint8]
"""uint8 ``[num_pages, bytes]``; the last axis contiguous."""


@dataclass(frozen=True, slots=True)
class _Type:
    """A floating-point type by its bits, whose order is that of the magnitudes."""

    bits: type[np.unsignedinteger[Any]]
    infinity: int
    """Bits of infinity; those of anything that is not a number lie above."""
    least: int
    """Bits of 2**-96: a span with nothing larger is kept as zeros, so that no quotient overflows.
    0 where no value is that small."""
    wide: type[np.floating[Any]]
    """In which is reckoned: wide enough that a span's largest value comes back as it was."""

    @property
    def magnitude(self) -> Any:
        """Every bit but the sign, as a number of this width."""
        return self.bits((1 << (8 * self.bits().itemsize - 1)) - 1)


_TYPES: Final = {
    "bfloat16": _Type(np.uint16, 0x7F80, 0x0F80, np.float32),
    "float16": _Type(np.uint16, 0x7C00, 0, np.float32),
    "float32": _Type(np.uint32, 0x7F80_0000, 0x0F80_0000, np.float64),
}


class Int8Form:
    """Turns pages of one type and size into their 8-bit form, and back.

    What comes back is the number of the page's type that is nearest to the whole number of steps:
    off by at most half a step (a 254th of the span's largest magnitude) and half a unit in the last
    place of the type. A page that came back once comes back the same ever after, so blocks that are
    loaded and stored again don't wear.
    """

    name: Final = "int8-64-v1"
    """Names every choice here: pages of another name can't be read. Part of the namespace."""

    def __init__(self, dtype: str, page_bytes: int) -> None:
        """Make the form of one kind of page.

        Args:
            dtype: Of its values, as torch names it without the prefix.
            page_bytes: Of the page as the engine keeps it.

        Raises:
            InputError: The type has no such form, or the page is no whole number of values.
        """
        if dtype not in _TYPES:
            raise InputError(
                f"kv_form int8 is made from KV in {', '.join(_TYPES)}, and this engine keeps "
                f"{dtype}: leave kv_form out"
            )
        self._type = _TYPES[dtype]
        value_bytes = self._type.bits().itemsize
        if page_bytes < 1 or page_bytes % value_bytes:
            raise InputError(f"a page of {page_bytes} bytes is no whole number of {dtype} values")
        self.page_bytes = page_bytes
        """Of a page as the engine keeps it."""
        self._num_values = page_bytes // value_bytes
        num_spans = -(-self._num_values // SPAN_VALUES)
        self.stored_bytes = self._num_values + num_spans * value_bytes
        """Of a page in this form."""

    def encode(self, pages: Pages, out: Pages) -> NDArray[np.bool_]:
        """Bring pages into this form.

        Args:
            pages: uint8 ``[num_pages, page_bytes]``.
            out: uint8 ``[num_pages, stored_bytes]``: receives them.

        Returns:
            bool ``[num_pages]``: whether every value is finite. What was written of the other pages
            must not be used.
        """
        kind = self._type
        bits, (steps, largest_out) = pages.view(kind.bits), self._parts(out)
        magnitudes = bits & kind.magnitude
        is_finite = np.ones(len(pages), dtype=np.bool_)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            for values, spans in self._runs():
                shape = self._shape(len(pages), values, spans)
                largest = magnitudes[:, values].reshape(shape).max(axis=2)
                is_finite &= (largest < kind.infinity).all(axis=1)
                largest[largest < kind.least] = 0
                per_value = STEPS / self._widened(largest)
                per_value[largest == 0] = 0
                wide = self._widened(bits[:, values]).reshape(shape)
                wide *= per_value[:, :, None]
                np.rint(wide, out=wide)
                np.copyto(steps[:, values].reshape(shape), wide, casting="unsafe")
                largest_out[:, spans] = largest
        return is_finite

    def decode(self, stored: Pages, out: Pages) -> NDArray[np.bool_]:
        """Bring pages back.

        Args:
            stored: uint8 ``[num_pages, stored_bytes]``; any bytes.
            out: uint8 ``[num_pages, page_bytes]``: receives them.

        Returns:
            bool ``[num_pages]``: whether the page was in this form; all its values are then finite.
            What was written of the other pages must not be used.
        """
        kind = self._type
        bits, (steps, largest) = out.view(kind.bits), self._parts(stored)
        is_readable: NDArray[np.bool_] = np.all(largest < kind.infinity, axis=1)
        is_readable &= steps.min(axis=1) >= -STEPS
        with np.errstate(invalid="ignore", over="ignore"):
            for values, spans in self._runs():
                shape = self._shape(len(stored), values, spans)
                wide = steps[:, values].astype(kind.wide).reshape(shape)
                wide *= (self._widened(largest[:, spans]) / kind.wide(STEPS))[:, :, None]
                self._narrow(wide, bits[:, values].reshape(shape))
        return is_readable

    def _parts(self, stored: Pages) -> tuple[NDArray[np.int8], NDArray[Any]]:
        """Steps ``[num_pages, num_values]`` and magnitudes' bits ``[num_pages, num_spans]``."""
        num_values = self._num_values
        return stored[:, :num_values].view(np.int8), stored[:, num_values:].view(self._type.bits)

    def _runs(self) -> Iterator[tuple[slice, slice]]:
        """Values and spans: those of whole spans, and the rest as a span of its own."""
        num_whole = self._num_values // SPAN_VALUES
        num_values = num_whole * SPAN_VALUES
        if num_whole:
            yield slice(0, num_values), slice(0, num_whole)
        if num_values < self._num_values:
            yield slice(num_values, self._num_values), slice(num_whole, num_whole + 1)

    @staticmethod
    def _shape(num_pages: int, values: slice, spans: slice) -> tuple[int, int, int]:
        """Pages, spans in each, values in each of these."""
        num_spans = spans.stop - spans.start
        return num_pages, num_spans, (values.stop - values.start) // num_spans

    def _widened(self, bits: NDArray[Any]) -> NDArray[Any]:
        """Values as wide floats, in an array of their own."""
        if self._type is not _TYPES["bfloat16"]:
            return bits.view(f"f{bits.itemsize}").astype(self._type.wide)
        wide = bits.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)

    def _narrow(self, wide: NDArray[Any], out: NDArray[Any]) -> None:
        """Round to the page's type; ``wide`` is used up."""
        if self._type is not _TYPES["bfloat16"]:
            np.copyto(out.view(f"f{out.itemsize}"), wide, casting="same_kind")
            return
        raised = wide.view(np.uint32)
        raised += np.uint32(0x8000)
        np.right_shift(raised, 16, out=out, casting="unsafe")
