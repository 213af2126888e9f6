"""Keys at other positions, compared with what models compute there."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kvkeep.adapters.dynamic_cache import from_dynamic_cache
from kvkeep.authoring.rotation import STUDIED, config_of_model, frequencies_of, moved
from kvkeep.cartridges.contents import Contents
from kvkeep.client.sequence_tensors import as_tensor
from kvkeep.model.errors import InputError
from tests.unit.authoring.tiny import tiny_config, tiny_model, write_config

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 900.0}
EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1}


def one_token_everywhere(model: Any, num_tokens: int = 40) -> Contents:
    """KV of one token repeated.

    All values of a layer are equal, so attention returns the same at every position, and keys of
    all layers differ by their rotation alone.
    """
    cache = DynamicCache()
    model(input_ids=torch.full((1, num_tokens), 65), past_key_values=cache, use_cache=True)
    return from_dynamic_cache(cache)


def settings_of(model: Any) -> dict[str, Any]:
    """A model's config.json."""
    return dict(json.loads(model.config.to_json_string()))


@pytest.mark.parametrize("model_type", STUDIED)
def test_keys_move_as_each_studied_model_turns_them(model_type: str) -> None:
    """In every layer, the key of position 2 becomes that of any other, and no other does."""
    more = EXPERTS if "mo" in model_type or model_type == "mixtral" else {}
    model = tiny_model(model_type, sliding_window=None, **more)
    kv = one_token_everywhere(model)
    frequencies = frequencies_of(settings_of(model), kv.shape[2])

    for key, _ in kv.layers:
        rows = key.numpy()
        turned = moved(as_tensor(rows[2:3].copy()), 35, frequencies).numpy()
        assert np.allclose(turned[0], rows[37], atol=1e-4)
        assert not np.allclose(turned[0], rows[36], atol=1e-2)


@pytest.mark.parametrize("rope", [LLAMA3, LINEAR], ids=lambda rope: str(rope["rope_type"]))
def test_stretched_rotations_are_known(rope: dict[str, Any]) -> None:
    """As transformers computes them."""
    model = tiny_model(rope_parameters=rope, head_dim=16)
    kv = one_token_everywhere(model)
    frequencies = frequencies_of(settings_of(model), 16)

    rows = kv.layers[1][0].numpy()
    turned = moved(as_tensor(rows[:5].copy()), 30, frequencies).numpy()
    assert np.allclose(turned, rows[30:35], atol=1e-4)


def test_forms_of_transformers_4_are_read() -> None:
    """Where the rotation's base and its stretching lay apart."""
    old = {
        "model_type": "llama",
        "rope_theta": 900.0,
        "rope_scaling": {"type": "linear", "factor": 3.0},
    }
    new = {"model_type": "llama", "rope_parameters": LINEAR}

    assert np.array_equal(frequencies_of(old, 8), frequencies_of(new, 8))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_keys_are_rounded_once(dtype: str) -> None:
    """To the nearest of what was computed in float32, as torch rounds."""
    exact = torch.randn(6, 2, 8, generator=torch.Generator().manual_seed(3))
    narrow = exact.to(getattr(torch, dtype))
    frequencies = frequencies_of({"model_type": "llama"}, 8)
    wide = moved(as_tensor(narrow.float()), 11, frequencies).numpy()
    wanted = as_tensor(torch.from_numpy(wide.copy()).to(getattr(torch, dtype)))

    assert moved(as_tensor(narrow), 11, frequencies) == wanted


def test_nothing_moves_by_nothing() -> None:
    """Position 0 is where keys are."""
    keys = as_tensor(torch.randn(4, 2, 8).to(torch.bfloat16))

    assert moved(keys, 0, frequencies_of({"model_type": "llama"}, 8)) == keys


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "phi"}, "keys of a phi model can't be moved to other positions"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary embeddings of type 'yarn' can't be"),
        ({"partial_rotary_factor": 0.5}, "turns 0.5 of each head"),
        ({"rope_parameters": {"full_attention": {}, "sliding": {}}}, "in several ways"),
        ({"rope_parameters": {"rope_type": "linear"}}, "not described whole"),
    ],
)
def test_what_can_t_be_moved_is_named(config: dict[str, Any], sentence: str) -> None:
    """Rather than moved wrongly."""
    with pytest.raises(InputError, match=sentence):
        frequencies_of({"model_type": "llama"} | config, 8)


def test_a_model_s_configuration_is_found(tmp_path: Path) -> None:
    """In its folder."""
    folder = write_config(tmp_path / "m", rope_theta=3.0)

    assert config_of_model(str(folder))["rope_theta"] == 3.0


@pytest.mark.parametrize("text", ["", "[]"])
def test_a_damaged_configuration_is_refused(tmp_path: Path, text: str) -> None:
    """In one sentence."""
    folder = write_config(tmp_path / "m")
    (folder / "config.json").write_text(text)

    with pytest.raises(InputError, match=r"config\.json"):
        config_of_model(str(folder))


def test_studied_models_are_known_to_transformers() -> None:
    """No name of the list is misspelt."""
    assert [tiny_config(name).model_type for name in STUDIED] == list(STUDIED)
