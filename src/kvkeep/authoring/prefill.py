"""A document's KV by one forward pass over its tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from kvkeep.adapters.dynamic_cache import from_dynamic_cache
from kvkeep.authoring.models import Author
from kvkeep.cartridges.contents import Contents
from kvkeep.model.errors import CapacityError


def prefill(author: Author, token_ids: Sequence[int]) -> Contents:
    """Keys and values of every token, rotated for the positions 0, 1, ...

    Raises:
        InputError: The model keeps something other than keys and values, or computes NaN.
        CapacityError: There is not enough memory.
    """
    return from_dynamic_cache(
        prefilled_cache(author, token_ids, author.dtype),
        token_ids=[int(each) for each in token_ids],
    )


def prefilled_cache(author: Author, token_ids: Sequence[int], dtype: str = "") -> Any:
    """The same as a cache on the model's device.

    Args:
        author: The model.
        token_ids: Of the document.
        dtype: Of the cache; empty: as the model computes.

    Raises:
        CapacityError: There is not enough memory.
    """
    cache = DynamicCache(config=author.model.config)
    ids = torch.tensor([list(token_ids)], device=author.device)
    try:
        with torch.no_grad():
            author.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise CapacityError(
            f"{len(token_ids)} tokens need more memory than there is: shorten the text, or use a "
            "larger machine"
        ) from error
    if dtype:
        for layer in cache.layers:
            layer.keys = layer.keys.to(getattr(torch, dtype))
            layer.values = layer.values.to(getattr(torch, dtype))
    return cache
