"""What decides a model's KV beside the tokens, in the words of an engine's connector.

An engine that runs the model with its own settings says exactly the same (decision 0017), so a
cartridge goes with it; one with other weights or settings names the field that differs.
"""

import hashlib
import json
from typing import Any

from kvkeep.connector.weights import digest_weights, find_folder
from kvkeep.protocol.messages import IDENTITY_PARTS_MAX, NAME_MAX

_LOAD_FORMAT = "auto"
_NO_PART_OF_A_MODEL = frozenset(
    ("_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype")
)


def identity_of_model(location: str, config: Any, dtype: str) -> dict[str, str]:
    """The identity of KV that transformers computes.

    Args:
        location: Of the model: a folder, or a Hugging Face id.
        config: The model's own configuration.
        dtype: Of the KV.

    Returns:
        Nothing where it can't be known: quantized weights, or weights that are not files here.
    """
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    folder = find_folder(location, None)
    digest = folder and digest_weights(folder, _LOAD_FORMAT)
    if not digest or fields.get("quantization_config"):
        return {}
    words = {
        "weights": f"{digest} {_LOAD_FORMAT} {{}}",
        "draft": "",
        "dtype": f"torch.{dtype}",
        "quantization": "None",
    }
    for name in sorted(fields.keys() - _NO_PART_OF_A_MODEL):
        words[f"config.{name}"] = json.dumps(fields[name])
    if len(words) > IDENTITY_PARTS_MAX // 2:
        return {}  # an engine would not say all of it, and what it leaves out would not compare
    return {name: _cut(value) for name, value in words.items()}


def _cut(value: str) -> str:
    """As the connector shortens a long value (connector/identity.py)."""
    if len(value) <= NAME_MAX:
        return value
    digest = hashlib.blake2b(value.encode(), digest_size=8).hexdigest()
    return f"{value[: NAME_MAX - len(digest) - 4]}... {digest}"
