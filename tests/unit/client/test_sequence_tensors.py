"""Tensors on their way to and from a daemon."""

import sys
import types
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvkeep.client.sequence_tensors import Tensor, as_tensor
from kvkeep.model.errors import InputError

SHAPE = (4, 2, 3)
RANDOM = np.random.default_rng(7)


def bits(dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Any bits of that width, NaNs among them."""
    return RANDOM.integers(0, np.iinfo(dtype).max, SHAPE, dtype=dtype, endpoint=True)


@pytest.mark.parametrize(
    ("dtype", "width"),
    [("float32", "uint32"), ("float16", "uint16"), ("int8", "uint8"), ("uint8", "uint8")],
)
def test_an_array_comes_back_bit_by_bit(dtype: str, width: str) -> None:
    """NaNs keep their payload, zeros their sign."""
    array = bits(width).view(dtype)
    tensor = as_tensor(array)

    assert (tensor.dtype, tensor.shape) == (dtype, SHAPE)
    assert tensor.numpy().tobytes() == array.tobytes() == bytes(tensor.data)
    assert tensor.numpy().dtype == array.dtype


@pytest.mark.parametrize(
    ("dtype", "width"),
    [("bfloat16", "uint16"), ("float8_e4m3fn", "uint8"), ("float8_e5m2", "uint8")],
)
def test_bits_of_a_dtype_that_numpy_lacks(dtype: str, width: str) -> None:
    """The caller says what they are, and gets them back as they were."""
    array = bits(width)
    tensor = as_tensor(array, dtype)

    assert tensor.dtype == dtype
    assert np.array_equal(tensor.bits(), array)
    assert bytes(tensor.data) == array.tobytes()


def test_what_does_not_lie_in_order_is_put_in_order() -> None:
    """A transposed view, every second token, other bytes first."""
    array = bits("uint32").view(np.float32)
    for view in (array.transpose(1, 0, 2), array[::2], array.astype(">f4")):
        tensor = as_tensor(view)

        assert tensor.shape == view.shape
        assert np.array_equal(tensor.numpy(), view.astype("=f4"), equal_nan=True)


def test_an_array_is_not_copied() -> None:
    """Where its rows follow one another already."""
    array = np.zeros(SHAPE, np.float32)
    tensor = as_tensor(array)
    array[0, 0, 0] = 1

    assert tensor.numpy()[0, 0, 0] == 1


class WithDlpack:
    """An array of somebody else's."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._array = array

    def __dlpack__(self, **keywords: object) -> object:
        return self._array.__dlpack__(**keywords)  # type: ignore[arg-type]

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


def test_buffers_and_dlpack_are_taken() -> None:
    """Whatever library they come from."""
    array = bits("uint8")

    assert as_tensor(WithDlpack(array)) == as_tensor(array)
    assert as_tensor(array.data) == as_tensor(array)


@pytest.mark.parametrize(
    "value", [None, 7, [1.0], "text", np.zeros(SHAPE, np.float64), np.zeros((2, 3), np.float32)]
)
def test_what_is_no_tensor_is_refused(value: object) -> None:
    """With one sentence, before anything is sent."""
    with pytest.raises(InputError):
        as_tensor(value)


def test_a_dtype_must_be_as_wide_as_its_bits() -> None:
    """Two bytes are no float8."""
    with pytest.raises(InputError, match="is not"):
        as_tensor(bits("uint16"), "float8_e5m2")


def test_equal_means_every_bit() -> None:
    """And dtype and shape."""
    one = as_tensor(bits("uint8"))
    other = Tensor("int8", one.shape, one.data)

    assert one == Tensor("uint8", SHAPE, memoryview(bytes(one.data)))
    assert one != other
    assert one != as_tensor(np.zeros(SHAPE, np.uint8))
    assert one != "a tensor"


def test_numpy_makes_an_array_of_it() -> None:
    """As of anything that is like an array."""
    array = np.ones(SHAPE, np.float32)

    assert np.array_equal(np.asarray(as_tensor(array)), array)
    assert np.asarray(as_tensor(array), dtype=np.int8).dtype == np.int8


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "int8"])
def test_torch_tensors_are_taken(dtype: str) -> None:
    """Bit by bit, also where numpy lacks their dtype; and torch reads what comes back."""
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    value = torch.arange(-12, 12).reshape(SHAPE).to(kind)
    tensor = as_tensor(value.transpose(0, 1))

    assert (tensor.dtype, tensor.shape) == (dtype, (2, 4, 3))
    back = torch.frombuffer(bytearray(tensor.data), dtype=kind).reshape(tensor.shape)
    assert torch.equal(back.float(), value.transpose(0, 1).float())


def test_a_tensor_elsewhere_than_on_the_cpu_is_refused() -> None:
    """It says what to hand in instead."""
    torch = pytest.importorskip("torch")
    with pytest.raises(InputError, match=r"tensor\.cpu\(\)"):
        as_tensor(torch.empty(SHAPE, device="meta"))


def test_dtypes_of_ml_dtypes_are_used_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without it there are bits for who asks for them, and no numbers that are wrong ones."""
    tensor = as_tensor(bits("uint16"), "bfloat16")
    kind = np.dtype([("bfloat16", "<u2")])
    monkeypatch.setitem(sys.modules, "ml_dtypes", types.SimpleNamespace(bfloat16=kind))

    assert tensor.numpy().dtype == kind
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    for ask in (tensor.numpy, lambda: np.asarray(tensor, np.float32)):
        with pytest.raises(InputError, match="numpy has no bfloat16: install ml_dtypes, or take"):
            ask()
    assert tensor.bits().dtype == np.uint16


def test_bits_have_to_be_named() -> None:
    """What 16 bits stand for nobody can guess."""
    with pytest.raises(InputError, match=r"as_tensor\(bits, 'bfloat16'\)"):
        as_tensor(bits("uint16"))
