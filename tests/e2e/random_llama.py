"""A small Llama with random weights, whose heads divide: the same bytes wherever it is made.

Its heads differ from one another and count: attention is as peaked as a trained model's, so that KV
of a wrong head moves every logprob. It says nothing that makes sense, and no token is likely.
"""

import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from kvkeep.stack.models import resolve_model

NUM_LAYERS = 4
NUM_HEADS = 8
NUM_KV_HEADS = 4
HEAD_DIM = 64
HIDDEN = 256
MLP = 512
SEED = 4
VERSION = 1
"""Grows when other bytes are written for the same numbers above."""
ATTENTION_SCALE = 1.5
"""Of queries and keys: their products get a standard deviation of about 2.2."""
LOGIT_SCALE = 2.0
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make_random_llama() -> Path:
    """The model's folder, made once for this user and these numbers."""
    numbers = (NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HIDDEN, MLP, SEED, VERSION)
    name = "-".join(map(str, (os.getuid(), *numbers)))
    target = Path(tempfile.gettempdir()) / f"random-llama-{name}"
    if not target.is_dir():
        partial = Path(tempfile.mkdtemp(prefix=f"{target.name}."))
        _write(partial)
        try:
            partial.rename(target)
        except OSError:  # somebody else was faster
            shutil.rmtree(partial)
    return target


def _write(folder: Path) -> None:
    source = Path(resolve_model("smollm2").location)
    for name in _TOKENIZER:
        shutil.copy(source / name, folder / name)
    trained = json.loads((source / "config.json").read_text())
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "rms_norm_eps")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "dtype": "float32",
        "head_dim": HEAD_DIM,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "max_position_embeddings": 2048,
        "num_attention_heads": NUM_HEADS,
        "num_hidden_layers": NUM_LAYERS,
        "num_key_value_heads": NUM_KV_HEADS,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        **{name: trained[name] for name in kept},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = _weights(int(config["vocab_size"]))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _weights(vocab_size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(SEED)

    def drawn(num_out: int, num_in: int, scale: float = 1.0) -> np.ndarray:
        """What turns inputs of variance 1 into outputs with this standard deviation."""
        values = rng.standard_normal((num_out, num_in), dtype=np.float32)
        return values * np.float32(scale / math.sqrt(num_in))

    ones = np.ones(HIDDEN, dtype=np.float32)
    found = {
        "model.embed_tokens.weight": rng.standard_normal((vocab_size, HIDDEN), dtype=np.float32),
        "model.norm.weight": ones,
        "lm_head.weight": drawn(vocab_size, HIDDEN, LOGIT_SCALE),
    }
    queries, keys = NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM
    for idx in range(NUM_LAYERS):
        layer = f"model.layers.{idx}"
        found |= {
            f"{layer}.input_layernorm.weight": ones.copy(),
            f"{layer}.post_attention_layernorm.weight": ones.copy(),
            f"{layer}.self_attn.q_proj.weight": drawn(queries, HIDDEN, ATTENTION_SCALE),
            f"{layer}.self_attn.k_proj.weight": drawn(keys, HIDDEN, ATTENTION_SCALE),
            f"{layer}.self_attn.v_proj.weight": drawn(keys, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": drawn(HIDDEN, queries),
            f"{layer}.mlp.gate_proj.weight": drawn(MLP, HIDDEN),
            f"{layer}.mlp.up_proj.weight": drawn(MLP, HIDDEN),
            f"{layer}.mlp.down_proj.weight": drawn(HIDDEN, MLP),
        }
    return found
