"""An engine's configuration, as far as the connector reads it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec

ENGINE_ID = "engine-1"


def make_weights(folder: Path, content: bytes = b"weights") -> Path:
    """A model's folder with one weight file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    return folder


def make_config(model: Path | str, **changes: Any) -> Any:
    """A configuration of a small Llama.

    Args:
        model: Folder or name of the model.
        changes: ``extra`` for kv_connector_extra_config, ``policy``, ``engine_id``,
            ``instance_id``, ``dtype``, ``cache_dtype``, ``load_format``, ``quantization``,
            ``tp_size``, ``pp_size``, ``dcp``, ``scales``, ``rank``, ``hf`` for fields of the
            model's own configuration, and ``model_config``, ``load_config``, ``cache_config`` and
            ``engine`` for further fields of vLLM's.
    """
    hf = {"hidden_size": 128, "num_hidden_layers": 3, "num_key_value_heads": 2}
    hf_config = LlamaConfig(**(hf | changes.get("hf", {})))
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(model),
            revision=None,
            dtype=changes.get("dtype", torch.bfloat16),
            quantization=changes.get("quantization"),
            hf_config=hf_config,
            get_total_num_kv_heads=lambda: hf_config.num_key_value_heads,
            **changes.get("model_config", {}),
        ),
        cache_config=SimpleNamespace(
            cache_dtype=changes.get("cache_dtype", "auto"),
            calculate_kv_scales=changes.get("scales", False),
            **changes.get("cache_config", {}),
        ),
        instance_id=changes.get("instance_id", "1"),
        load_config=SimpleNamespace(
            load_format=changes.get("load_format", "auto"), **changes.get("load_config", {})
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=changes.get("tp_size", 1),
            pipeline_parallel_size=changes.get("pp_size", 1),
            decode_context_parallel_size=changes.get("dcp", 1),
            rank=changes.get("rank", 0),
        ),
        kv_transfer_config=SimpleNamespace(
            engine_id=changes.get("engine_id", ENGINE_ID),
            kv_load_failure_policy=changes.get("policy", "recompute"),
            kv_connector_extra_config=changes.get("extra", {"socket": "/nowhere/d.sock"}),
        ),
        **changes.get("engine", {}),
    )


def make_spec(**changes: Any) -> FullAttentionSpec:
    """How one layer of ``make_config`` keeps its blocks on one rank."""
    fields = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.bfloat16}
    return FullAttentionSpec(**(fields | changes))


def make_cache_config(*specs: Any, num_blocks: int = 8) -> Any:
    """The KV cache of ``make_config``: three layers, one group per spec."""
    groups = [
        SimpleNamespace(layer_names=[f"layers.{i}" for i in range(3)], kv_cache_spec=spec)
        for spec in specs or (make_spec(),)
    ]
    return SimpleNamespace(num_blocks=num_blocks, kv_cache_groups=groups)
