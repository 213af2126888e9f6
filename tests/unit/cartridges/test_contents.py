"""KV in memory: what fits together is taken, and what does not is refused by name."""

from collections.abc import Callable

import numpy as np
import pytest

from kvkeep.cartridges.contents import Contents, is_finite, make_contents
from kvkeep.client.sequence_tensors import as_tensor
from kvkeep.model.errors import InputError
from tests.unit.cartridges.made import SHAPE, contents, finite_tensor

Layers = list[tuple[object, object]]
T = finite_tensor(1)
SHORT = finite_tensor(1, shape=(5, 2, 4))
NARROW = finite_tensor(1, shape=(6, 2, 2))


def test_arrays_are_taken_as_they_are() -> None:
    """Tokens, heads, elements and dtype follow from them."""
    array = np.ones(SHAPE, np.float16)
    made = make_contents([(array, array)], num_frozen_tokens=1, token_ids=range(6))

    assert (made.num_tokens, made.dtype, made.shape) == (6, "float16", SHAPE)
    assert made.token_ids is not None
    assert made.token_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert made.layers[0][0] == as_tensor(array)


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ([], "1 to 511 layers, not 0"),
        ([(T, T)] * 512, "1 to 511 layers, not 512"),
        ([(T, T), (SHORT, T)], r"Layer 1 K shape \(5, 2, 4\) != layer 0 K shape \(6, 2, 4\)"),
        ([(T, SHORT)], r"Layer 0 V shape \(5, 2, 4\)"),
        ([(T, T), (T, NARROW)], r"Layer 1 V shape \(6, 2, 2\)"),
        ([(T, finite_tensor(1, "bfloat16"))], "Layer 0 V dtype bfloat16 != layer 0 K dtype float"),
        ([(np.zeros(SHAPE, np.int8),) * 2], "Layer 0 K is int8"),
        ([(np.zeros((0, 2, 4), np.float32),) * 2], "the cartridge is empty"),
        ([(np.zeros((2, 4), np.float32),) * 2], r"\[tokens, heads, dim\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(layers: Layers, told: str) -> None:
    """The first layer that differs is named, with both shapes."""
    with pytest.raises(InputError, match=told):
        make_contents(layers)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_nan_and_infinities_are_refused_by_name(dtype: str, number: float) -> None:
    """One bad element among all spoils every answer, so it never gets into a file."""
    bits = np.zeros(SHAPE, np.float32)
    bits[3, 1, 2] = number
    if dtype == "bfloat16":
        bad = as_tensor((bits.view(np.uint32) >> 16).astype(np.uint16), dtype)
    else:
        bad = as_tensor(bits.astype(dtype))
    good = finite_tensor(1, dtype)

    assert not is_finite(bad)
    with pytest.raises(InputError, match="Layer 1 V holds NaN or Inf"):
        make_contents([(good, good), (good, bad)])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_largest_number_is_finite(dtype: str) -> None:
    """Only an exponent of ones all through is none."""
    largest = {"float32": 0xFF7F_FFFF, "float16": 0xFBFF, "bfloat16": 0xFF7F}[dtype]
    kind = np.uint32 if dtype == "float32" else np.uint16

    assert is_finite(as_tensor(np.full(SHAPE, largest, kind), dtype))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: contents(token_ids=[1, 2]), "2 token ids don't go with 6 tokens"),
        (lambda: contents(token_ids=[0, 1, 2, 3, 4, -1]), "not between 0 and 2147483647"),
        (lambda: contents(token_ids=[0, 1, 2, 3, 4, 1 << 31]), "not between 0 and 2147483647"),
        (lambda: contents(num_frozen_tokens=7), "7 frozen tokens don't fit 6 tokens"),
        (lambda: contents(num_frozen_tokens=-1), "-1 frozen tokens"),
    ],
)
def test_tokens_that_can_t_be_are_refused(make: Callable[[], Contents], told: str) -> None:
    """Ids and frozen tokens have to go with the KV."""
    with pytest.raises(InputError, match=told):
        make()
