"""Every difference between vLLM 0.26, 0.32 and 0.33 that the connector meets.

Features are tested for, not version numbers: builds carry names of their own.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from vllm.platforms import current_platform

from kvkeep.connector.scheduler.block_names import Named
from kvkeep.model.announced import POOL_MEDIUM

HEAD_MAJOR_0_26 = "HND"
HEAD_MAJOR_0_32 = "LBHNC"


def adopt_logging() -> None:
    """Send kvkeep's messages where vLLM's own go."""
    theirs, ours = logging.getLogger("vllm"), logging.getLogger("kvkeep")
    if not ours.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level or logging.INFO)
        ours.propagate = not theirs.handlers


def head_major_layout() -> str:
    """The layout in which each KV head of a block is one run of bytes, as this vLLM names it.

    MultiConnector compares the strings of its children, so they are exactly those NixlConnector
    gives (vllm 0.26 and 0.32, v1/nixl/connector.py).
    """
    try:
        import vllm.v1.kv_cache_layout  # noqa: F401 - only whether it is there
    except ImportError:
        return HEAD_MAJOR_0_26
    return HEAD_MAJOR_0_32


def host_hit_source() -> Any:
    """Label of the hits in vLLM's metrics; absent in 0.26."""
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource
    except ImportError:
        return None
    return CacheHitSource.HOST


def calls_layers(forward_context: Any) -> bool:
    """Whether a step's layers call the connector one by one; a graph of the whole model does not.

    ``CUDAGraphMode`` of vllm 0.26 to 0.33, config/compilation.py.
    """
    mode = getattr(forward_context, "cudagraph_runtime_mode", None)
    return mode is None or mode.name in ("NONE", "PIECEWISE")


def page_format(spec: Any, dtype: torch.dtype, cache_dtype: str) -> str:
    """Order of bytes inside a head page, for the namespace.

    FlashAttention, FlashInfer and Triton keep the same bytes for the same layout in 0.26 to 0.33:
    per token, K then V. The CPU build keeps K transposed, per instruction set.

    Raises:
        NotImplementedError: This platform's pages were never studied.
    """
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        isa = _get_attn_isa(dtype, spec.block_size, spec.head_size, cache_dtype)
        return f"cpu-hnd-{isa}"
    if current_platform.is_cuda():
        return "gpu-hnd-kv"
    raise NotImplementedError(f"page format unknown on {current_platform.device_type}")


def total_kv_heads(vllm_config: Any) -> int:
    """KV heads of the whole model, all ranks together."""
    return int(vllm_config.model_config.get_total_num_kv_heads())


def cache_dtype_name(vllm_config: Any) -> str:
    """Element type of the cache, without torch's prefix."""
    name = str(vllm_config.cache_config.cache_dtype)
    return str(vllm_config.model_config.dtype).removeprefix("torch.") if name == "auto" else name


def is_recompute_sound() -> bool:
    """Whether vLLM answers right when a synchronous load failed and it computes the blocks.

    Not where asynchronous scheduling or the V2 model runner may be on, as on GPUs: the count of
    computed tokens is then not taken back everywhere (vllm 0.26 to 0.33, issue 49250). The CPU
    platform has neither.
    """
    return bool(current_platform.is_cpu())


def touch(block_pool: Any, blocks: Sequence[Any]) -> None:
    """Take a reference on engine blocks."""
    block_pool.touch(blocks)


def free(block_pool: Any, blocks: Iterable[Any]) -> None:
    """Give references back; the first block is reused first."""
    block_pool.free_blocks(blocks)


def forget(block_pool: Any, block_ids: Set[int]) -> None:
    """Take engine blocks out of vLLM's own prefix cache; whoever holds them goes on."""
    block_pool.evict_blocks(block_ids)


def new_block_ids(scheduler_output: Any) -> Mapping[str, tuple[bool, tuple[list[int], ...], int]]:
    """What this step schedules, by request id.

    Returns:
        Whether the block ids replace those known (new or resumed), the block ids per group, and
        the tokens computed before this step.
    """
    found = {
        new.req_id: (True, new.block_ids, int(new.num_computed_tokens))
        for new in scheduler_output.scheduled_new_reqs
    }
    cached = scheduler_output.scheduled_cached_reqs
    resumed = cached.resumed_req_ids
    for req_id, ids, num_computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        found[req_id] = (req_id in resumed, ids or (), int(num_computed))
    return found


def input_processor() -> Any:
    """The class that every rendered prompt passes in the front-end; None where there is none."""
    try:
        from vllm.v1.engine.input_processor import InputProcessor
    except ImportError:
        return None
    return InputProcessor


def client_error(sentence: str) -> Exception:
    """What vLLM answers with status 400 and this sentence: in 0.32 no ``ValueError`` any more."""
    try:
        from vllm.exceptions import VLLMValidationError
    except ImportError:
        return ValueError(sentence)
    error: Exception = VLLMValidationError(sentence)
    return error


def attention_layers(vllm_config: Any) -> Mapping[str, Any]:
    """The engine's attention layers by name, in the model's order.

    vllm 0.26 to 0.33: every attention layer registers itself there when it is made
    (model_executor/layers/attention).
    """
    layers = vllm_config.compilation_config.static_forward_context
    return {name: layers[name] for name in sorted(layers, key=_numbers_in)}


def _numbers_in(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdigit())


def salt(request: Any, value: str | None) -> None:
    """Give a request another salt in vLLM's own prefix cache, before its next lookup there."""
    request.cache_salt = value
    request.block_hashes.clear()
    request.update_block_hashes()


def read_cache(request: Any) -> None:
    """Have vLLM ask the connector also for a request that is to compute its whole prompt."""
    request.skip_reading_prefix_cache = False


def is_finished_well(request: Any) -> bool:
    """Whether a request that ended was answered: not aborted, not given up."""
    return request.status.name in ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED")


def has_events(vllm_config: Any) -> bool:
    """Whether this engine publishes what happens to its blocks."""
    config = vllm_config.kv_events_config
    return config is not None and bool(config.enable_kv_cache_events)


def block_named(named: Named, block_tokens: int) -> Any:
    """An event of vLLM's own kind that says what stored blocks are of."""
    from vllm.distributed.kv_events import BlockStored

    fields: dict[str, Any] = {
        "block_hashes": named.numbers,
        "parent_block_hash": named.parent,
        "token_ids": named.token_ids,
        "block_size": block_tokens,
        "lora_id": None,
        "medium": POOL_MEDIUM,
        "lora_name": named.lora_name,
    }
    if named.salt is not None:
        # One entry for each block; a salt stands in the first one's.
        fields["extra_keys"] = [(named.salt,), *([None] * (len(named.numbers) - 1))]
    return BlockStored(**fields)
