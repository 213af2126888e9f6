"""A checkpoint with random weights of a trained model's magnitude, for hosts without a model hub.

vLLM's dummy weights are so small that attention is uniform and keys do not matter: an answer then
hardly notices a wrong block. With these weights it does, and any seed gives the same file.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SEED = 1
WEIGHT_STD = 0.02
"""As transformers initialises Qwen3."""
KEY_NORM = 3.0
"""Scales the keys, so that attention has peaks: scores get this standard deviation."""
VOCABULARY = 49152
"""Rows of the embedding; fewer than the original's, because they make up no KV."""


def tensors(config: dict[str, Any], device: str) -> Iterator[tuple[str, Any]]:
    """Name and bf16 tensor of every parameter of a Qwen3 model, in a fixed order."""
    import torch

    generator = torch.Generator(device=device).manual_seed(SEED)
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = (config[f"num_{kind}_heads"] * head for kind in ("attention", "key_value"))

    def matrix(rows: int, columns: int) -> Any:
        drawn = torch.randn(rows, columns, device=device, generator=generator)
        return (drawn * WEIGHT_STD).to(torch.bfloat16).cpu()

    def scale(size: int, value: float = 1.0) -> Any:
        return torch.full((size,), value, dtype=torch.bfloat16)

    yield "model.embed_tokens.weight", matrix(config["vocab_size"], hidden)
    yield "lm_head.weight", matrix(config["vocab_size"], hidden)
    yield "model.norm.weight", scale(hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, rows, columns in (
            ("self_attn.q_proj", query, hidden),
            ("self_attn.k_proj", key, hidden),
            ("self_attn.v_proj", key, hidden),
            ("self_attn.o_proj", hidden, query),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            yield f"{prefix}.{name}.weight", matrix(rows, columns)
        yield f"{prefix}.self_attn.q_norm.weight", scale(head)
        yield f"{prefix}.self_attn.k_norm.weight", scale(head, KEY_NORM)
        yield f"{prefix}.input_layernorm.weight", scale(hidden)
        yield f"{prefix}.post_attention_layernorm.weight", scale(hidden)


def make_model(source: Path, target: Path, *, num_layers: int) -> None:
    """Write the model's folder, unless it is there.

    Args:
        source: Folder with the ``config.json`` to follow and tokenizer files.
        target: Folder to write; complete or absent afterwards.
        num_layers: Layers to make, in place of the configuration's number.
    """
    import torch
    from safetensors.torch import save_file

    if target.exists():
        return
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    config = json.loads((source / "config.json").read_text())
    config |= {"num_hidden_layers": num_layers, "max_window_layers": num_layers}
    config["vocab_size"] = min(config["vocab_size"], VOCABULARY)
    (partial / "config.json").write_text(json.dumps(config, indent=1))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    save_file(dict(tensors(config, device)), partial / "model.safetensors", {"format": "pt"})
    partial.rename(target)
