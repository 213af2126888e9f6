"""A cartridge as a ``DynamicCache`` of transformers and back, bit by bit.

    cartridge = read_cartridge(Path("ships.safetensors"))
    cache = to_dynamic_cache(cartridge.contents)
    model(input_ids=question_ids, past_key_values=cache)

The question's tokens then stand behind the document's: transformers counts positions from the
cache's length. A forward pass appends to the cache it is given, so make one for each request.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvkeep.cartridges.contents import Contents, make_contents
from kvkeep.client.sequence_tensors import Tensor
from kvkeep.model.errors import InputError


def to_dynamic_cache(
    contents: Contents, *, device: str = "cpu", dtype: Any = None, batch: int = 1
) -> Any:
    """A cache that a model of transformers takes as what it has seen so far.

    Args:
        contents: Of a cartridge; copied, so that nothing done to the cache reaches it.
        device: Where the model is.
        dtype: Of torch; None: the cartridge's own, bit by bit.
        batch: Requests that are asked at once, each after the same document.
    """
    return cache_of(
        tuple(_to_torch(tensor, device, dtype).repeat(batch, 1, 1, 1) for tensor in layer)
        for layer in contents.layers
    )


def cache_of(layers: Any) -> Any:
    """A cache over tensors as they are: pairs ``[batch, heads, tokens, dim]``, one a layer."""
    return DynamicCache(list(layers))


def from_dynamic_cache(
    cache: Any,
    *,
    num_tokens: int | None = None,
    num_frozen_tokens: int = 0,
    token_ids: Sequence[int] | None = None,
) -> Contents:
    """What a model has computed, as a cartridge's contents; copied.

    Args:
        cache: Of one request, from its first token on.
        num_tokens: How many leading tokens are taken; None: all.
        num_frozen_tokens: Leading tokens that training left as they were.
        token_ids: Ids of the tokens, where they are known.

    Raises:
        InputError: It has several requests, layers that keep only a window or something other than
            keys and values, no tokens, NaN or infinities.
    """
    layers = [_checked(layer_idx, layer) for layer_idx, layer in enumerate(_layers(cache))]
    return make_contents(
        [(_from_torch(key, num_tokens), _from_torch(value, num_tokens)) for key, value in layers],
        num_frozen_tokens=num_frozen_tokens,
        token_ids=token_ids,
    )


def _layers(cache: Any) -> Iterator[Any]:
    if not hasattr(cache, "layers"):
        raise InputError(f"a {type(cache).__name__} is no DynamicCache: hand in one of these")
    yield from cache.layers


def _checked(layer_idx: int, layer: Any) -> tuple[Any, Any]:
    if type(layer) is not DynamicLayer:
        raise InputError(
            f"layer {layer_idx} of the cache is a {type(layer).__name__}, which does not keep the "
            "keys and values of every token: models with such layers have no cartridges"
        )
    if not layer.is_initialized:
        raise InputError(f"layer {layer_idx} of the cache is empty: run the model first")
    if layer.keys.shape[0] != 1:
        raise InputError(
            f"layer {layer_idx} of the cache has {layer.keys.shape[0]} requests: hand in one"
        )
    return layer.keys, layer.values


def _to_torch(tensor: Tensor, device: str, dtype: Any) -> Any:
    """``[1, heads, tokens, dim]``."""
    named = getattr(torch, tensor.dtype)
    # A copy: torch wants memory that may be written.
    flat = torch.frombuffer(bytearray(tensor.data), dtype=named)
    laid = flat.reshape(tensor.shape).permute(1, 0, 2).unsqueeze(0).contiguous()
    return laid.to(device=device, dtype=dtype or named)


def _from_torch(laid: Any, num_tokens: int | None) -> Any:
    """``[tokens, heads, dim]`` on the CPU, of its own memory."""
    rows = laid.detach()[0].permute(1, 0, 2)[:num_tokens]
    return rows.to("cpu", copy=True).contiguous()
