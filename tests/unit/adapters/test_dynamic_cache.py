"""Cartridges as caches of transformers and back."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvkeep.adapters.dynamic_cache import from_dynamic_cache, to_dynamic_cache
from kvkeep.model.errors import InputError
from tests.unit.authoring.tiny import tiny_model
from tests.unit.cartridges.made import contents

IDS = torch.tensor([[5, 9, 200, 31, 7, 7, 90, 14, 3, 250]])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bits_come_back_as_they_were(dtype: str) -> None:
    """There and back again, keys, values and ids, whatever the dtype."""
    kv = contents(3, dtype=dtype, token_ids=[1, 2, 3, 4, 5, 6])
    back = from_dynamic_cache(to_dynamic_cache(kv), token_ids=[1, 2, 3, 4, 5, 6])

    assert list(back.layers) == list(kv.layers)
    assert back.token_ids is not None
    assert back.token_ids.tolist() == [1, 2, 3, 4, 5, 6]


def test_a_cache_is_laid_as_transformers_lays_it() -> None:
    """Requests, heads, tokens, elements; each head's rows are its own."""
    kv = contents(2)
    cache = to_dynamic_cache(kv, batch=3)

    assert tuple(cache.layers[1].keys.shape) == (3, 2, 6, 4)
    wanted = torch.from_numpy(kv.layers[1][0].numpy().copy())[4, 1]
    assert torch.equal(cache.layers[1].keys[2, 1, 4], wanted)
    assert cache.get_seq_length() == 6


def test_logits_behind_a_cartridge_are_those_behind_its_tokens() -> None:
    """The canary: what was computed, kept and put back does what the tokens themselves do."""
    model, computed = tiny_model(), DynamicCache()
    whole = model(input_ids=IDS).logits
    model(input_ids=IDS[:, :6], past_key_values=computed, use_cache=True)
    cache = to_dynamic_cache(from_dynamic_cache(computed))
    behind = model(input_ids=IDS[:, 6:], past_key_values=cache).logits

    assert torch.allclose(behind, whole[:, 6:], atol=1e-4)


def test_another_document_gives_other_logits() -> None:
    """The canary can die."""
    model = tiny_model()
    whole = model(input_ids=IDS).logits
    computed = DynamicCache()
    model(input_ids=IDS[:, :6].flip(1), past_key_values=computed, use_cache=True)
    cache = to_dynamic_cache(from_dynamic_cache(computed))
    behind = model(input_ids=IDS[:, 6:], past_key_values=cache).logits

    assert not torch.allclose(behind, whole[:, 6:], atol=1e-2)


def test_a_request_leaves_the_cartridge_as_it_was() -> None:
    """A forward pass appends to the cache that it is given, and to nothing else."""
    kv = contents(2, shape=(6, 2, 8))
    before = [tensor.data.tobytes() for layer in kv.layers for tensor in layer]
    cache = to_dynamic_cache(kv)
    tiny_model()(input_ids=IDS, past_key_values=cache)
    cache.layers[0].keys.zero_()

    assert cache.get_seq_length() == 16
    assert [tensor.data.tobytes() for layer in kv.layers for tensor in layer] == before


def test_leading_tokens_alone_are_taken() -> None:
    """Where a number is given."""
    kv = contents(2)
    back = from_dynamic_cache(to_dynamic_cache(kv), num_tokens=4, num_frozen_tokens=1)

    assert back.shape == (4, 2, 4)
    assert back.num_frozen_tokens == 1
    assert back.layers[1][1].data == kv.layers[1][1].data[: 4 * 2 * 4 * 4]


def _windowed() -> Any:
    # As a model with a sliding window makes it.
    window = torch.tensor(4)
    tensors = torch.zeros(1, 2, 3, 4)
    return DynamicCache([(tensors, tensors, window)])


def _of_nan() -> Any:
    return DynamicCache([(torch.full((1, 2, 3, 4), float("nan")), torch.zeros(1, 2, 3, 4))])


@pytest.mark.parametrize(
    ("cache", "sentence"),
    [
        (_windowed, "layer 0 of the cache is a DynamicSlidingWindowLayer, which does not keep"),
        (lambda: to_dynamic_cache(contents(), batch=2), "has 2 requests: hand in one"),
        (_of_nan, "Layer 0 K holds NaN or Inf"),
        (lambda: 7, "a int is no DynamicCache"),
        (DynamicCache, "a cartridge has 1 to 511 layers, not 0"),
    ],
    ids=["window", "several", "nan", "no-cache", "empty"],
)
def test_what_is_no_cartridge_is_refused(cache: Any, sentence: str) -> None:
    """In a sentence that names the layer."""
    with pytest.raises(InputError, match=sentence):
        from_dynamic_cache(cache())
