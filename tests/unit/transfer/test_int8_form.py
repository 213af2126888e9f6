"""The 8-bit form: its bytes, its size, and what it refuses."""

import numpy as np
import pytest
import torch

from kvkeep.model.errors import InputError
from kvkeep.transfer.int8_form import Int8Form, Pages

PAGE_BYTES = 8192


def page_of(values: list[float], dtype: torch.dtype = torch.bfloat16) -> Pages:
    """One page, uint8 ``[1, page_bytes]``."""
    page: Pages = torch.tensor([values], dtype=dtype).view(torch.uint8).numpy()
    return page


@pytest.mark.parametrize(
    ("dtype", "page_bytes", "stored_bytes"),
    [
        ("bfloat16", 8192, 4096 + 64 * 2),
        ("float16", 8192, 4096 + 64 * 2),
        ("float32", 8192, 2048 + 32 * 4),
        ("bfloat16", 130, 65 + 2 * 2),
        ("float16", 2, 1 + 2),
    ],
)
def test_sizes(dtype: str, page_bytes: int, stored_bytes: int) -> None:
    """A byte a value and one magnitude for each 64 of them, of the page's own type."""
    form = Int8Form(dtype, page_bytes)

    assert form.stored_bytes == stored_bytes
    assert form.page_bytes == page_bytes


def test_the_bytes_of_a_page() -> None:
    """Whole numbers of 127ths of the largest magnitude, then the magnitudes; this never changes.

    If it must change, so must the form's name.
    """
    page = page_of([-127.0, 1.0, 63.25, 0.0] + [2.0] * 60 + [0.5, -0.25])
    form = Int8Form("bfloat16", page.shape[1])
    stored = np.zeros((1, form.stored_bytes), np.uint8)
    form.encode(page, stored)

    expected = np.array([-127, 1, 63, 0] + [2] * 60 + [127, -64], np.int8).view(np.uint8)
    assert stored[0, :66].tolist() == expected.tolist()
    assert stored[0, 66:].tobytes() == page_of([127.0, 0.5]).tobytes()
    assert Int8Form.name == "int8-64-v1"


def test_pages_far_apart_in_memory_are_understood() -> None:
    """Rows may lie apart, as the heads of a block do in a slot."""
    chance = np.random.default_rng(3)
    values = torch.from_numpy(chance.standard_normal((4, 100))).to(torch.float16)
    pages = np.zeros((4, 300), np.uint8)
    pages[:, :200] = values.view(torch.uint8).numpy()
    form = Int8Form("float16", 200)
    apart, together = np.zeros((4, 500), np.uint8), np.zeros((4, form.stored_bytes), np.uint8)
    form.encode(pages[:, :200], apart[:, : form.stored_bytes])
    form.encode(pages[:, :200].copy(), together)

    np.testing.assert_array_equal(apart[:, : form.stored_bytes], together)
    assert not apart[:, form.stored_bytes :].any()
    back = np.zeros((4, 300), np.uint8)
    assert form.decode(apart[:, : form.stored_bytes], back[:, :200]).all()
    assert not back[:, 200:].any()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("position", [0, 63, 64, 99])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_value_that_is_not_finite(value: float, position: int, dtype: torch.dtype) -> None:
    """Wherever it stands in its page, the page is named, and no other."""
    values = [0.5] * 100
    values[position] = value
    pages = np.concatenate([page_of([1.0] * 100, dtype), page_of(values, dtype)])
    form = Int8Form(str(dtype).removeprefix("torch."), pages.shape[1])
    stored = np.zeros((2, form.stored_bytes), np.uint8)

    assert form.encode(pages, stored).tolist() == [True, False]


@pytest.mark.parametrize(
    ("position", "byte"),
    [(5, 0x80), (64 * 2 + 1, 0x7F), (64 * 2 + 3, 0xFF)],
    ids=["step", "magnitude", "sign"],
)
def test_a_page_that_is_not_in_this_form(position: int, byte: int) -> None:
    """A step below -127, and a magnitude that is infinite, no number or negative, are refused."""
    form = Int8Form("bfloat16", 64 * 4)
    stored = np.zeros((2, form.stored_bytes), np.uint8)
    stored[:, 64 * 2 :] = 0x3F
    stored[1, position] = byte
    if byte == 0x7F:
        stored[1, position - 1] = 0x80
    back = np.zeros((2, form.page_bytes), np.uint8)

    assert form.decode(stored, back).tolist() == [True, False]


@pytest.mark.parametrize(
    ("dtype", "page_bytes", "said"),
    [
        ("fp8_e4m3", PAGE_BYTES, "leave kv_form out"),
        ("bfloat16", 0, "no whole number"),
        ("bfloat16", 4097, "no whole number"),
        ("float32", 4098, "no whole number"),
    ],
)
def test_what_has_no_such_form_is_refused(dtype: str, page_bytes: int, said: str) -> None:
    """One sentence says why."""
    with pytest.raises(InputError, match=said):
        Int8Form(dtype, page_bytes)
