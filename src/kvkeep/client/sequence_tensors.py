"""Tensors on their way to and from a daemon: anything with a buffer, numpy, torch, DLPack.

Bytes are never changed. numpy has no bfloat16 and no 8-bit floats of its own: of such tensors there
are arrays where the package ``ml_dtypes`` is installed, and everywhere the integers of the same
bits. Integers are given to nobody who did not ask for bits: as numbers they would be wrong ones. No
torch is needed; a torch tensor is taken as it is.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvkeep.model.errors import InputError
from kvkeep.protocol.tensors import DTYPES

_PLAIN = frozenset({"float32", "float16", "int8", "uint8"})
_BITS: dict[int, npt.DTypeLike] = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@dataclass(frozen=True, eq=False)
class Tensor:
    """K or V of one layer: ``[tokens, heads, dim]``, rows of which follow one another."""

    dtype: str
    """One of ``float32``, ``float16``, ``bfloat16``, ``int8``, ``uint8``, ``float8_e4m3fn``,
    ``float8_e5m2``."""
    shape: tuple[int, int, int]
    data: memoryview
    """Its bytes. ``torch.frombuffer(t.data, dtype=torch.bfloat16).reshape(t.shape)`` is a torch
    tensor over the same memory."""

    def bits(self) -> npt.NDArray[Any]:
        """Unsigned integers as wide as an element: the same bits."""
        flat: npt.NDArray[Any] = np.frombuffer(self.data, _BITS[DTYPES[self.dtype][1]])
        return flat.reshape(self.shape)

    def numpy(self) -> npt.NDArray[Any]:
        """An array over the same memory.

        Raises:
            InputError: numpy does not know the dtype, and there is no ``ml_dtypes``.
        """
        bits = self.bits()
        if self.dtype in _PLAIN:
            return bits.view(self.dtype)
        try:
            known = importlib.import_module("ml_dtypes")
        except ImportError as error:
            raise InputError(
                f"numpy has no {self.dtype}: install ml_dtypes, or take bits(), which are "
                f"{bits.dtype} of the same bits"
            ) from error
        return bits.view(getattr(known, self.dtype))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """What numpy makes of it; an InputError where ``numpy()`` has one."""
        array = self.numpy()
        return array.astype(dtype) if dtype is not None or copy else array

    def __eq__(self, other: object) -> bool:
        """Whether dtype, shape and every bit are equal."""
        if not isinstance(other, Tensor):
            return NotImplemented
        alike = (self.dtype, self.shape) == (other.dtype, other.shape)
        return alike and self.data == other.data

    __hash__ = None  # type: ignore[assignment]  # as arrays have none


def as_tensor(value: object, dtype: str = "") -> Tensor:
    """Take what a caller has, without a copy where its rows follow one another.

    Args:
        value: A ``Tensor``, a numpy or torch array on the CPU, or anything with a buffer or with
            ``__dlpack__``: ``[tokens, heads, dim]``.
        dtype: What its bits are, where the array can't say: ``bfloat16`` for uint16 bits.

    Raises:
        InputError: It has another number of dimensions, or a dtype that is not taken.
    """
    if isinstance(value, Tensor):
        return value
    array, named = _as_bits(value)
    dtype = dtype or named
    if dtype not in DTYPES:
        hint = "; of bits say what they are, as in as_tensor(bits, 'bfloat16')"
        raise InputError(
            f"dtype {dtype} is not taken: choose from {', '.join(DTYPES)}"
            + (hint if dtype == "uint16" else "")
        )
    if array.ndim != 3 or array.itemsize != DTYPES[dtype][1]:
        raise InputError(
            f"an array of shape {list(array.shape)} and {array.itemsize} bytes an element is not "
            f"[tokens, heads, dim] of {dtype}"
        )
    tokens, heads, dim = array.shape
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return Tensor(dtype, (tokens, heads, dim), flat.data.toreadonly())


def _as_bits(value: object) -> tuple[npt.NDArray[Any], str]:
    """An array of the same bits, and what the dtype is called."""
    if hasattr(value, "detach") and hasattr(value, "element_size"):
        return _from_torch(value)
    try:
        if isinstance(value, np.ndarray):
            array = value
        elif hasattr(value, "__dlpack__"):
            array = np.from_dlpack(value)
        else:
            array = np.asarray(memoryview(value))  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise InputError(
            f"a {type(value).__name__} can't be taken as an array on the CPU ({error})"
        ) from error
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    named = array.dtype.name
    is_foreign = array.dtype.kind == "V" or named not in _PLAIN
    if is_foreign and array.dtype.itemsize in _BITS:
        array = array.view(_BITS[array.dtype.itemsize])
    return array, named


def _from_torch(value: Any) -> tuple[npt.NDArray[Any], str]:
    """Torch is the caller's: it is asked by the methods of its own tensors."""
    named = str(value.dtype).removeprefix("torch.")
    if value.device.type != "cpu":
        raise InputError(f"the tensor is on {value.device}: hand in tensor.cpu()")
    if named in _PLAIN:
        return value.detach().numpy(), named
    # numpy can't hold the dtype; integers as wide can.
    owner = importlib.import_module("torch")
    narrow = owner.uint8 if value.element_size() == 1 else owner.int16
    bits = value.detach().contiguous().view(narrow).numpy()
    return bits.view(_BITS[bits.itemsize]), named
