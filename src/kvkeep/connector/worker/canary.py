"""Before serving: every layer and head is written to the pool and read back, through the real path.

A wrong stride, a swapped layer or a head of another rank would otherwise be a silent wrong answer.
Where the pool keeps pages in another form, what lies there must be the form of what was written,
and what comes back must be what was written, within a step of the form.

The canary lives in engine block 0, which vLLM keeps as its null block and no request ever owns
(vllm 0.26 to 0.33, v1/core/block_pool.py), and in a pool slot that the daemon lends for it. What
was in block 0 is put back.
"""

import numpy as np
import numpy.typing as npt
import torch

from kvkeep.connector.worker.movers import BlockMover, rank_digests
from kvkeep.connector.worker.views import EngineMemory
from kvkeep.model.errors import CorruptDataError
from kvkeep.tiers.shared_memory import PoolView
from kvkeep.transfer.int8_form import STEPS, Int8Form

NULL_BLOCK_ID = 0
_BYTE_LIMIT = 0x3C
"""Bytes below this make small finite numbers in every floating-point format, should the engine
look at its null block while a canary is in it."""
_NUMBER_LIMIT = 2.0**-6
"""Of numbers, where bytes would not do: drawn as bytes all but a few are next to nothing beside the
largest, and a form with few steps can't tell them from 0."""


def run_canary(memory: EngineMemory, mover: BlockMover, pool: PoolView, slot: int) -> None:
    """Write a pattern through the pool and back.

    Raises:
        CorruptDataError: What came back is not what was written, or not where; nothing may be
            loaded or stored through this pool.
    """
    form = mover.form
    saved = [tensor[NULL_BLOCK_ID].clone() for tensor in memory.tensors]
    draw = _pattern if form is None else _number_pattern
    patterns = [draw(tensor, layer) for layer, tensor in enumerate(memory.tensors)]
    try:
        for tensor, pattern in zip(memory.tensors, patterns, strict=True):
            tensor[NULL_BLOCK_ID].copy_(pattern)
        mover.store(pool, [NULL_BLOCK_ID], [slot], mover.snapshot())
        _compare_pool(memory, pool, slot, patterns, form)
        for tensor in memory.tensors:
            tensor[NULL_BLOCK_ID].zero_()
        landed = mover.load(pool, [slot], [NULL_BLOCK_ID], rank_digests(pool, [slot], memory))
        if not landed.all():
            raise CorruptDataError("the start-up canary's digests do not match")
        for layer, (tensor, pattern) in enumerate(zip(memory.tensors, patterns, strict=True)):
            if not _is_back(tensor[NULL_BLOCK_ID], pattern, form):
                raise CorruptDataError(f"the start-up canary came back changed. layer={layer}")
    finally:
        for tensor, content in zip(memory.tensors, saved, strict=True):
            tensor[NULL_BLOCK_ID].copy_(content)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _pattern(tensor: torch.Tensor, layer: int) -> torch.Tensor:
    """A block of bytes that no other layer has, of the tensor's own shape and type."""
    block = tensor[NULL_BLOCK_ID]
    generator = np.random.default_rng(layer)
    values = generator.integers(0, _BYTE_LIMIT, size=block.numel() * block.element_size())
    flat = torch.from_numpy(values.astype(np.uint8))
    return flat.view(block.dtype).view(block.shape).to(block.device)


def _number_pattern(tensor: torch.Tensor, layer: int) -> torch.Tensor:
    """The same of numbers that are all of about the same size."""
    block = tensor[NULL_BLOCK_ID]
    values = np.random.default_rng(layer).uniform(-_NUMBER_LIMIT, _NUMBER_LIMIT, block.numel())
    return torch.from_numpy(values).view(block.shape).to(block.dtype).to(block.device)


def _is_back(found: torch.Tensor, pattern: torch.Tensor, form: Int8Form | None) -> bool:
    """Whether what came back is what was written: to the bit, or within a step of the form."""
    if form is None:
        return bool(torch.equal(_as_bytes(found), _as_bytes(pattern)))
    farthest = (found.double() - pattern.double()).abs().max()
    return bool(farthest <= pattern.double().abs().max() / STEPS)


def _as_stored(head: torch.Tensor, form: Int8Form | None) -> npt.NDArray[np.uint8]:
    """What the pool should hold of a head's page."""
    page: npt.NDArray[np.uint8] = _as_bytes(head).cpu().numpy().reshape(-1)
    if form is None:
        return page
    stored = np.empty(form.stored_bytes, dtype=np.uint8)
    form.encode(page[None], stored[None])
    return stored


def _compare_pool(
    memory: EngineMemory,
    pool: PoolView,
    slot: int,
    patterns: list[torch.Tensor],
    form: Int8Form | None,
) -> None:
    """The slot must hold each layer's heads where the layout says, not just somewhere."""
    layout = pool.geometry.layout
    pages = pool.payload(slot).reshape(layout.num_layers, layout.num_heads, layout.page_bytes)
    for layer, pattern in enumerate(patterns):
        for head in range(memory.num_heads):
            expected = _as_stored(pattern[head], form)
            if not np.array_equal(pages[layer, memory.first_head + head], expected):
                raise CorruptDataError(
                    f"the start-up canary lies elsewhere in the pool. layer={layer} head={head}"
                )
