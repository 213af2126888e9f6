"""Layers that write KV as GPUs do, and a rank's memory without an engine."""

from types import SimpleNamespace
from typing import Any

import torch

from kvkeep.cartridges.contents import Contents
from kvkeep.connector.worker.views import EngineMemory
from tests.unit.cartridges.made import contents
from tests.unit.connector.worker.memories import (
    BLOCK_TOKENS,
    CONTENT,
    make_layout,
    make_memory,
    make_tensors,
)

NUM_LAYERS = 3
NUM_HEADS = 4
HEAD_DIM = CONTENT // 2


class Impl:
    """Keys, then values, of each token; counts what it wrote."""

    def __init__(self) -> None:
        self.num_tokens = 0

    def do_kv_cache_update(
        self, _: Any, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: Any
    ) -> None:
        """See vLLM's attention backends."""
        assert key.dtype == cache.dtype
        self.num_tokens += len(slots)
        both = torch.cat([key, value], dim=2)
        for token_idx, slot in enumerate(slots.tolist()):
            cache[slot // BLOCK_TOKENS, :, slot % BLOCK_TOKENS] = both[token_idx]


def make_layers(num_layers: int = NUM_LAYERS) -> dict[str, Any]:
    """Attention layers by name."""
    return {f"layers.{idx}": SimpleNamespace(impl=Impl()) for idx in range(num_layers)}


def rank_memory(tp_rank: int = 0, tp_size: int = 1) -> EngineMemory:
    """A rank's blocks of the model."""
    num_heads = NUM_HEADS // tp_size
    layout = make_layout(NUM_HEADS, NUM_LAYERS)
    tensors = make_tensors(num_heads, num_layers=NUM_LAYERS)
    return make_memory(tensors, layout, tp_rank=tp_rank, tp_size=tp_size)


def document(num_blocks: int = 5, seed: int = 3) -> Contents:
    """A cartridge's KV for this model."""
    shape = (num_blocks * BLOCK_TOKENS, NUM_HEADS, HEAD_DIM)
    return contents(NUM_LAYERS, seed=seed, dtype="bfloat16", shape=shape)


def expected_block(kv: Contents, layer: int, block: int, heads: slice) -> torch.Tensor:
    """What a block of a layer has to be, as bits: ``[heads, tokens, content]``."""
    tokens = slice(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)
    halves = [
        torch.from_numpy(tensor.bits()[tokens, heads].astype("int32"))
        for tensor in kv.layers[layer]
    ]
    return torch.cat(halves, dim=2).permute(1, 0, 2).to(torch.int16)
