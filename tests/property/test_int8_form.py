"""Pages in 8 bits come back near what they were, once and for all; whatever is in them."""

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.transfer.int8_form import SPAN_VALUES, STEPS, Int8Form

NUM_PAGES = 3
TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LEAST = 2.0**-96
"""A span with nothing larger comes back as zeros."""

dtypes = st.sampled_from(sorted(TORCH))
num_values = st.one_of(st.integers(1, 200), st.sampled_from([64, 128, 1024, 4096]))
seeds = st.integers(0, 2**32 - 1)


def random_pages(dtype: str, count: int, seed: int) -> np.ndarray[Any, Any]:
    """Bits drawn evenly: numbers of every size, infinities, and what is no number."""
    chance = np.random.default_rng(seed)
    return chance.integers(0, 256, (NUM_PAGES, count * TORCH[dtype].itemsize), dtype=np.uint8)


def finite_pages(dtype: str, count: int, seed: int) -> np.ndarray[Any, Any]:
    """Spans of very different magnitudes, some of zeros; every value is finite."""
    chance = np.random.default_rng(seed)
    spans = -(-count // SPAN_VALUES)
    spread = {"bfloat16": 120, "float16": 14, "float32": 120}[dtype]
    exponents = np.repeat(chance.uniform(-spread, spread, (NUM_PAGES, spans)), SPAN_VALUES, 1)
    values = chance.standard_t(3, (NUM_PAGES, count)).clip(-3, 3) * 2.0 ** exponents[:, :count]
    values *= np.repeat(chance.random((NUM_PAGES, spans)) > 0.1, SPAN_VALUES, 1)[:, :count]
    tensor = torch.from_numpy(values).to(TORCH[dtype])
    assert bool(torch.isfinite(tensor).all())
    return np.array(tensor.view(torch.uint8).numpy())


def as_numbers(pages: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """The values of pages, float64 ``[num_pages, num_values]``."""
    values = torch.frombuffer(bytearray(pages.tobytes()) or bytearray(8), dtype=TORCH[dtype])
    count = pages.shape[1] // values.itemsize
    numbers = np.array(values.to(torch.float64).numpy())
    return numbers[: len(pages) * count].reshape(len(pages), count)


def encoded(form: Int8Form, pages: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    """Pages in their form, and which of them may be used."""
    out = np.full((len(pages), form.stored_bytes), 0xA5, np.uint8)
    is_finite = form.encode(pages, out)
    return out, is_finite


def decoded(form: Int8Form, stored: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    """Pages as they come back, and which of them may be used."""
    out = np.full((len(stored), form.page_bytes), 0xA5, np.uint8)
    is_readable = form.decode(stored, out)
    return out, is_readable


def span_maxima(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """For each value the largest magnitude of its span, reckoned value by value."""
    found = np.empty_like(values)
    for start in range(0, values.shape[1], SPAN_VALUES):
        span = slice(start, start + SPAN_VALUES)
        found[:, span] = np.abs(values[:, span]).max(axis=1, keepdims=True)
    return found


def half_units(values: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """Half a unit in the last place of each value, in its type."""
    info = torch.finfo(TORCH[dtype])
    exponents = np.floor(np.log2(np.maximum(np.abs(values), info.smallest_normal)))
    return np.asarray(2.0**exponents * info.eps / 2)


@settings(deadline=None)
@given(dtype=dtypes, count=num_values, seed=seeds)
def test_every_value_comes_back_near(dtype: str, count: int, seed: int) -> None:
    """Off by half a step of its span and half a unit of its type; the largest not at all."""
    pages = finite_pages(dtype, count, seed)
    form = Int8Form(dtype, pages.shape[1])
    stored, is_finite = encoded(form, pages)
    back, is_readable = decoded(form, stored)

    assert is_finite.all()
    assert is_readable.all()
    before, after = as_numbers(pages, dtype), as_numbers(back, dtype)
    largest = span_maxima(before)
    allowed = largest / STEPS / 2 * (1 + 1e-5) + half_units(after, dtype)
    is_kept = largest >= LEAST
    assert (np.abs(after - before)[is_kept] <= allowed[is_kept]).all()
    assert not after[~is_kept].any()
    is_largest = is_kept & (np.abs(before) == largest)
    assert (after[is_largest] == before[is_largest]).all()


@settings(deadline=None)
@given(dtype=dtypes, count=num_values, seed=seeds)
def test_what_came_back_once_comes_back_the_same(dtype: str, count: int, seed: int) -> None:
    """A block that is loaded and stored again has the same bytes in the pool."""
    pages = finite_pages(dtype, count, seed)
    form = Int8Form(dtype, pages.shape[1])
    stored, _ = encoded(form, pages)
    back, _ = decoded(form, stored)
    again, _ = encoded(form, back)

    np.testing.assert_array_equal(again, stored)


@settings(deadline=None)
@given(dtype=dtypes, count=num_values, seed=seeds)
def test_pages_that_are_not_finite_are_named(dtype: str, count: int, seed: int) -> None:
    """Exactly those with an infinity or no number are refused; the others come back near."""
    pages = random_pages(dtype, count, seed)
    form = Int8Form(dtype, pages.shape[1])
    stored, is_finite = encoded(form, pages)

    expected = np.isfinite(as_numbers(pages, dtype)).all(axis=1)
    np.testing.assert_array_equal(is_finite, expected)
    back, is_readable = decoded(form, stored[is_finite])
    assert is_readable.all()
    before, after = as_numbers(pages[is_finite], dtype), as_numbers(back, dtype)
    assert (np.abs(after - before) <= span_maxima(before) / STEPS + LEAST).all()


@settings(deadline=None)
@given(dtype=dtypes, count=num_values, seed=seeds)
def test_hostile_bytes_are_finite_or_refused(dtype: str, count: int, seed: int) -> None:
    """Whatever bytes lie in a page: each value that may be used is finite."""
    form = Int8Form(dtype, count * TORCH[dtype].itemsize)
    chance = np.random.default_rng(seed)
    stored = chance.integers(0, 256, (NUM_PAGES, form.stored_bytes), dtype=np.uint8)
    stored[0] = 0x7F  # the largest steps, and magnitudes above every number
    back, is_readable = decoded(form, stored)

    assert np.isfinite(as_numbers(back[is_readable], dtype)).all()
    stored[:, :count][stored[:, :count] == 0x80] = 0x81
    width = TORCH[dtype].itemsize
    stored[:, count + width - 1 :: width] &= 0x3F  # every magnitude below 2
    assert decoded(form, stored)[1].all()
