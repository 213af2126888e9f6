"""vLLM's KV tensors as addresses of head pages.

vLLM gives one logical view per layer, ``(num_blocks, num_heads, block_tokens, content)``; with the
head-major layout that the connector asks for, each head of a block is one run of bytes in it
(vllm 0.26 to 0.33, v1/attention/backends/flash_attn.py and cpu_attn.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvkeep.connector.identity import Unsupported
from kvkeep.model.layout import KvLayout


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """One rank's KV blocks."""

    tensors: tuple[torch.Tensor, ...]
    """One per layer that keeps KV of its own, in the engine's order."""
    layer_addresses: npt.NDArray[np.uint64]
    """uint64 ``[num_layers]``: block 0, head 0 of each layer."""
    block_stride: int
    """Bytes from a block to the next."""
    head_stride: int
    """Bytes from a head to the next."""
    first_head: int
    """Of the model's heads, the first in this rank's memory."""
    num_heads: int
    """Heads in this rank's memory."""
    is_writer: bool
    """False if another rank holds the same heads and stores them."""
    layer_indices: Mapping[str, int] = field(default_factory=dict)
    """Which of ``tensors`` the engine's layer of a name reads; layers may share one."""

    @property
    def device(self) -> torch.device:
        """Where the blocks lie."""
        return self.tensors[0].device


def view_engine_memory(
    kv_caches: Mapping[str, Any], num_blocks: int, layout: KvLayout, *, tp_rank: int, tp_size: int
) -> EngineMemory:
    """Find the head pages in what ``register_kv_caches`` was given.

    Raises:
        Unsupported: The tensors are not head-major, or not of this layout.
    """
    unique = {t.data_ptr(): t for t in kv_caches.values() if isinstance(t, torch.Tensor)}
    tensors = tuple(unique.values())
    places = {address: idx for idx, address in enumerate(unique)}
    if len(tensors) != layout.num_layers:
        raise Unsupported(f"{len(tensors)} KV tensors for {layout.num_layers} layers")
    shape, strides = _common(tensors)
    element = tensors[0].element_size()
    if len(shape) != 4 or shape[0] != num_blocks or shape[2] != layout.block_tokens:
        raise Unsupported(f"KV tensors of shape {tuple(shape)} are not understood")
    if strides[3] != 1 or strides[2] != shape[3]:
        raise Unsupported("the KV layout is not head-major: unset VLLM_KV_CACHE_LAYOUT")
    if shape[2] * shape[3] * element != layout.page_bytes:
        raise Unsupported("head pages differ in size from what the configuration says")
    first_head, is_writer = rank_heads(layout.num_heads, shape[1], tp_rank, tp_size)
    return EngineMemory(
        tensors=tensors,
        layer_addresses=np.array([t.data_ptr() for t in tensors], dtype=np.uint64),
        block_stride=strides[0] * element,
        head_stride=strides[1] * element,
        first_head=first_head,
        num_heads=shape[1],
        is_writer=is_writer,
        layer_indices={
            name: places[t.data_ptr()]
            for name, t in kv_caches.items()
            if isinstance(t, torch.Tensor)
        },
    )


def _common(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Size, tuple[int, ...]]:
    shape, strides = tensors[0].shape, tensors[0].stride()
    if any(t.shape != shape or t.stride() != strides for t in tensors):
        raise Unsupported("layers with KV of different shapes are not supported")
    return shape, strides


def rank_heads(total: int, local: int, tp_rank: int, tp_size: int) -> tuple[int, bool]:
    """The first head of a rank, and whether this rank is the one that stores its heads.

    With more ranks than heads vLLM replicates: head ``rank // replicas`` (vllm 0.26 to 0.33,
    model_executor/layers/linear.py, QKVParallelLinear).

    Raises:
        Unsupported: The heads do not divide.
    """
    if tp_size <= total:
        if total % tp_size or local != total // tp_size:
            raise Unsupported(f"{local} KV heads on a rank of {tp_size}, {total} in all")
        return tp_rank * local, True
    if tp_size % total or local != 1:
        raise Unsupported(f"{local} KV heads on a rank of {tp_size}, {total} in all")
    replicas = tp_size // total
    return tp_rank // replicas, tp_rank % replicas == 0
