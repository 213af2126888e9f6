"""Turns keys to other positions: rotary embeddings as models of the Llama family compute them.

A key at position p is its unrotated self with the pairs (i, i + dim/2) turned by p times a
frequency. So keys of one position become those of another by turning them by the difference,
without the model. Needs numpy only.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kvkeep.client.sequence_tensors import Tensor, as_tensor
from kvkeep.connector.weights import find_folder
from kvkeep.model.errors import InputError
from kvkeep.stack.models import resolve_model

STUDIED = ("granite", "llama", "mistral", "mixtral", "olmo2", "qwen2", "qwen3", "qwen3_moe")
"""Types of models that turn whole heads, in halves, and the same in every layer; a test compares
the keys that each computes at two positions."""
KINDS = ("default", "linear", "llama3")
"""Of frequencies that depend on neither the length of a request nor the layer."""

Frequencies = npt.NDArray[np.float64]


def config_of_model(name: str) -> dict[str, Any]:
    """The ``config.json`` of a model on this machine.

    Raises:
        InputError: It is not there.
        UnavailableError: The packaged model could not be converted.
    """
    folder = find_folder(resolve_model(name).location, None)
    try:
        if folder is None:
            raise FileNotFoundError(name)
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {name} has no config.json on this machine: name --model FOLDER"
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"the config.json of model {name} holds no object: mend it")
    return found


def frequencies_of(config: Mapping[str, Any], head_dim: int) -> Frequencies:
    """By how much each pair of a head turns from one position to the next, ``[head_dim / 2]``.

    Args:
        config: The model's ``config.json``, in the form of transformers 4 or 5.
        head_dim: Of the cartridge.

    Raises:
        InputError: Keys of such a model can't be turned; the sentence says why.
    """
    kind_of_model = config.get("model_type")
    if kind_of_model not in STUDIED:
        raise InputError(
            f"keys of a {kind_of_model} model can't be moved to other positions: known are "
            f"{', '.join(STUDIED)}"
        )
    rope = _parameters(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in KINDS:
        raise InputError(
            f"keys with rotary embeddings of type {kind!r} can't be moved to other positions: "
            f"known are {', '.join(KINDS)}"
        )
    try:
        return _frequencies(kind, rope, head_dim)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"the model's rotary embeddings of type {kind!r} are not described whole ({error!r}): "
            "mend its config.json"
        ) from error


def _parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers 5 writes them, whoever wrote them."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise InputError("the model's layers turn keys in several ways: it can't be composed for")
    rope.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    if part != 1.0:
        raise InputError(f"the model turns {part} of each head: only whole heads can be moved")
    return rope


def _frequencies(kind: str, rope: Mapping[str, Any], head_dim: int) -> Frequencies:
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    plain: Frequencies = 1.0 / float(rope["rope_theta"]) ** exponents
    if kind == "default":
        return plain
    slow: Frequencies = plain / float(rope["factor"])
    if kind == "linear":
        return slow
    # Long waves are stretched, short ones stay, those between go over from the one to the other.
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    turns = float(rope["original_max_position_embeddings"]) * plain / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    between: Frequencies = (1.0 - share) * slow + share * plain
    return between


def moved(keys: Tensor, positions: int, frequencies: Frequencies) -> Tensor:
    """Keys as they would be so many positions later; rounded once to their dtype."""
    angles = positions * frequencies
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    wide = _widened(keys)
    half = keys.shape[2] // 2
    first, second = wide[..., :half], wide[..., half:]
    turned = np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return _narrowed(turned, keys.dtype)


def _widened(tensor: Tensor) -> npt.NDArray[np.float32]:
    if tensor.dtype == "bfloat16":
        return (tensor.bits().astype(np.uint32) << 16).view(np.float32)
    return tensor.numpy().astype(np.float32)


def _narrowed(values: npt.NDArray[np.float32], dtype: str) -> Tensor:
    if dtype != "bfloat16":
        return as_tensor(values.astype(dtype))
    bits = np.ascontiguousarray(values).view(np.uint32)
    # To the nearest, and to the even one of two that are as near.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return as_tensor(rounded.astype(np.uint16), "bfloat16")
