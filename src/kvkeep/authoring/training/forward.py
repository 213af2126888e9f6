"""Forward passes of several requests behind one prefix, each as long as it is."""

from collections.abc import Sequence
from typing import Any

import torch

from kvkeep.adapters.dynamic_cache import cache_of

Layers = Sequence[tuple[Any, Any]]
"""Keys and values of a prefix, ``[1, heads, tokens, dim]``, on the model's device."""


def layers_of(cache: Any, num_tokens: int | None = None) -> list[tuple[Any, Any]]:
    """A cache's tensors; their leading tokens where a number is given."""
    return [
        (layer.keys[:, :, :num_tokens], layer.values[:, :, :num_tokens]) for layer in cache.layers
    ]


def cache_for(layers: Layers, batch: int, dtype: Any) -> Any:
    """A cache of as many requests, each behind the prefix; gradients reach the layers."""
    return cache_of(
        (key.to(dtype).expand(batch, -1, -1, -1), value.to(dtype).expand(batch, -1, -1, -1))
        for key, value in layers
    )


def logits_behind(model: Any, layers: Layers | None, rows: Sequence[Sequence[int]]) -> Any:
    """What the model expects after each token of each row, ``float32 [rows, longest, vocabulary]``.

    Args:
        model: Of transformers.
        layers: The prefix; None: there is none.
        rows: Token ids behind the prefix. Logits behind the end of a shorter row mean nothing.
    """
    device = model.device
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    seen = torch.zeros(len(rows), longest, dtype=torch.long)
    for row_idx, row in enumerate(rows):
        ids[row_idx, : len(row)] = torch.tensor(row)
        seen[row_idx, : len(row)] = 1
    if layers is None:
        return model(
            input_ids=ids.to(device), attention_mask=seen.to(device), use_cache=False
        ).logits.float()
    prefix = torch.ones(len(rows), layers[0][0].shape[2], dtype=torch.long)
    return model(
        input_ids=ids.to(device),
        attention_mask=torch.cat((prefix, seen), dim=1).to(device),
        past_key_values=cache_for(layers, len(rows), model.dtype),
        use_cache=True,
    ).logits.float()
