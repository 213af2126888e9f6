"""Canonical keys and values as head pages of this engine's own form.

A page's bytes are the engine's affair: the CPU build keeps keys transposed, GPUs keep them per
token. So the layer that would write them while it computes writes them here, into blocks that lie
like its own and that no request ever sees.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from kvkeep.cartridges.contents import Contents
from kvkeep.client.sequence_tensors import Tensor
from kvkeep.connector.worker.views import EngineMemory
from kvkeep.model.errors import RefusedError

DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


class Scratch:
    """A few blocks of one rank, outside the engine's own."""

    def __init__(self, memory: EngineMemory, layers: Mapping[str, Any], num_blocks: int) -> None:
        """Make them.

        Args:
            memory: Of the engine: how its blocks lie.
            layers: The engine's attention layers by name, in the model's order.
            num_blocks: How many.

        Raises:
            RefusedError: A layer can't write KV by itself.
        """
        self.num_blocks = num_blocks
        shape = (num_blocks, *memory.tensors[0].shape[1:])
        self._tensors = tuple(
            torch.zeros(shape, dtype=each.dtype, device=each.device) for each in memory.tensors
        )
        self._block_tokens = int(shape[2])
        self._heads = slice(memory.first_head, memory.first_head + memory.num_heads)
        self._layers = _in_order(memory, layers)
        element = self._tensors[0].element_size()
        strides = self._tensors[0].stride()
        self.memory = EngineMemory(
            tensors=self._tensors,
            layer_addresses=np.array([t.data_ptr() for t in self._tensors], dtype=np.uint64),
            block_stride=strides[0] * element,
            head_stride=strides[1] * element,
            first_head=memory.first_head,
            num_heads=memory.num_heads,
            is_writer=memory.is_writer,
        )

    def fill(self, contents: Contents, first_block: int, num_blocks: int) -> None:
        """Write a run of a cartridge's blocks into the first blocks here.

        Args:
            contents: Of the cartridge, as many layers as the engine has.
            first_block: Of the run.
            num_blocks: Of the run, ``num_blocks`` of this object at most.
        """
        tokens = slice(
            first_block * self._block_tokens, (first_block + num_blocks) * self._block_tokens
        )
        device = self._tensors[0].device
        slots = torch.arange(num_blocks * self._block_tokens, dtype=torch.int64, device=device)
        with torch.inference_mode():
            for (layer, tensor_idx), (key, value) in zip(
                self._layers, contents.layers, strict=True
            ):
                layer.impl.do_kv_cache_update(
                    layer,
                    self._part(key, tokens).to(device),
                    self._part(value, tokens).to(device),
                    self._tensors[tensor_idx],
                    slots,
                )

    def _part(self, tensor: Tensor, tokens: slice) -> torch.Tensor:
        """Some tokens of this rank's heads, ``[tokens, heads, dim]``."""
        bits = np.array(tensor.bits()[tokens, self._heads])
        signed = bits.view(np.int16 if bits.itemsize == 2 else np.int32)
        return torch.from_numpy(signed).view(DTYPES[tensor.dtype])


def _in_order(memory: EngineMemory, layers: Mapping[str, Any]) -> Sequence[tuple[Any, int]]:
    """Each layer that keeps KV of its own, and which tensor is its."""
    found: dict[int, Any] = {}
    for name, layer in layers.items():
        tensor_idx = memory.layer_indices.get(name)
        if tensor_idx is not None and tensor_idx not in found:
            found[tensor_idx] = layer
    writes = all(hasattr(getattr(e, "impl", None), "do_kv_cache_update") for e in found.values())
    if len(found) != len(memory.tensors) or not writes:
        raise RefusedError("this engine's layers can't write a cartridge's keys and values")
    return [(layer, tensor_idx) for tensor_idx, layer in found.items()]
