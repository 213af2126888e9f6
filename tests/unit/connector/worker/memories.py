"""KV tensors as vLLM lays them out, and a pool of their layout."""

from pathlib import Path

import torch

from kvkeep.connector.worker.views import EngineMemory, view_engine_memory
from kvkeep.model.ids import BlockHash, BlockKey, Namespace
from kvkeep.model.layout import KvLayout
from kvkeep.tiers.shared_memory import PoolFile, PoolView
from kvkeep.tiers.slot_header import SlotState

NUM_BLOCKS = 8
BLOCK_TOKENS = 16
CONTENT = 64
POOL_BYTES = 4 << 20
NAMESPACE = Namespace(b"n" * 32)


def make_layout(num_heads: int = 2, num_layers: int = 3) -> KvLayout:
    """Blocks of bfloat16, 2 KiB a head page."""
    page_bytes = BLOCK_TOKENS * CONTENT * 2
    return KvLayout(num_layers, num_heads, page_bytes, BLOCK_TOKENS, "bfloat16", "test")


def make_tensors(num_heads: int, *, num_layers: int = 3, is_one_buffer: bool = True) -> dict[
    str, torch.Tensor
]:  # fmt: skip
    """One rank's layers, ``[blocks, heads, tokens, content]``, filled with numbers of their own.

    Args:
        num_heads: On this rank.
        num_layers: Of the model.
        is_one_buffer: Layers one behind the other in one allocation, as vLLM 0.32 does; else a
            tensor each, as 0.26.
    """
    shape = (NUM_BLOCKS, num_heads, BLOCK_TOKENS, CONTENT)
    if is_one_buffer:
        layers = list(torch.zeros(num_layers, *shape, dtype=torch.bfloat16))
    else:
        layers = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(num_layers)]
    return {f"layers.{idx}": layer for idx, layer in enumerate(layers)}


def fill(tensors: dict[str, torch.Tensor], seed: int) -> None:
    """Give every element a value of its own."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors.values():
        values = torch.randint(-30000, 30000, tensor.shape, generator=generator)
        tensor.view(torch.int16).copy_(values)


def make_memory(
    tensors: dict[str, torch.Tensor], layout: KvLayout, *, tp_rank: int = 0, tp_size: int = 1
) -> EngineMemory:
    """The head pages in these tensors."""
    return view_engine_memory(tensors, NUM_BLOCKS, layout, tp_rank=tp_rank, tp_size=tp_size)


def is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of bfloat16 hold the same bits; as numbers, NaNs would differ."""
    return bool(
        torch.equal(one.contiguous().view(torch.int16), other.contiguous().view(torch.int16))
    )


class Pool:
    """A pool without a daemon: slots are lent by whoever holds it."""

    def __init__(self, folder: Path, layout: KvLayout) -> None:
        self.file = PoolFile.open(folder / "pool", POOL_BYTES)
        self.file.format(layout)
        self.view: PoolView = self.file.view()

    def commit(self, slot: int, block_hash: BlockHash) -> None:
        """Make a slot readable under a key, as the daemon does when its heads are complete."""
        self.file.mark(slot, SlotState.READY, BlockKey(NAMESPACE, block_hash))

    def close(self) -> None:
        """Give it back; the mapping goes with the last array that shows a part of it."""
        self.file.close()
        del self.file, self.view
