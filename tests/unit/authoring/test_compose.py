"""Several cartridges as one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kvkeep.adapters.dynamic_cache import from_dynamic_cache, to_dynamic_cache
from kvkeep.authoring.compose import compose, joined
from kvkeep.authoring.prefill import prefill
from kvkeep.authoring.rotation import frequencies_of
from kvkeep.cartridges.file_format import Cartridge, read_cartridge
from kvkeep.model.errors import InputError, RefusedError
from tests.unit.authoring.test_rotation import settings_of
from tests.unit.authoring.tiny import tiny_author, tiny_model, write_config
from tests.unit.cartridges.made import contents, written

FIRST, SECOND = [3, 80, 17, 60], [201, 5, 9, 33, 34]


@pytest.fixture
def model_folder(tmp_path: Path) -> str:
    """Of a Llama with room for 64 tokens."""
    return str(write_config(tmp_path / "model", max_position_embeddings=64))


def made(tmp_path: Path, name: str, **more: Any) -> Cartridge:
    """One that is read from its file."""
    return read_cartridge(written(tmp_path, name, **more)[0])


def apart(model: Any) -> Any:
    """A cache of both documents at their places, the second one not attending to the first."""
    cache = DynamicCache()
    model(input_ids=torch.tensor([FIRST]), past_key_values=cache, use_cache=True)
    seen = torch.zeros(1, 1, len(SECOND), len(FIRST) + len(SECOND))
    seen[..., : len(FIRST)] = float("-inf")
    seen[0, 0, :, len(FIRST) :] = torch.full((len(SECOND),) * 2, float("-inf")).triu(1)
    model(
        input_ids=torch.tensor([SECOND]),
        position_ids=torch.arange(len(FIRST), len(FIRST) + len(SECOND))[None],
        attention_mask=seen,
        past_key_values=cache,
        use_cache=True,
    )
    return cache


def test_composed_is_computed_side_by_side() -> None:
    """Each document attends to itself alone, at the positions where it stands: same KV, logits."""
    model = tiny_model()
    author = tiny_author(model)
    parts = [prefill(author, FIRST), prefill(author, SECOND)]
    kv = joined(parts, frequencies_of(settings_of(model), 8))
    wanted = from_dynamic_cache(apart(model))

    for mine, theirs in zip(kv.layers, wanted.layers, strict=True):
        assert np.allclose(mine[0].numpy(), theirs[0].numpy(), atol=1e-4)
        assert np.allclose(mine[1].numpy(), theirs[1].numpy(), atol=1e-4)
    asked = torch.tensor([[40, 41, 42]])
    behind = model(input_ids=asked, past_key_values=to_dynamic_cache(kv)).logits
    assert torch.allclose(
        behind, model(input_ids=asked, past_key_values=apart(model)).logits, atol=1e-3
    )


def test_composed_is_not_what_the_whole_text_computes() -> None:
    """In one prompt the second document attends to the first: so there are no ids to match."""
    model = tiny_model()
    author = tiny_author(model)
    parts = [prefill(author, FIRST), prefill(author, SECOND)]
    kv = joined(parts, frequencies_of(settings_of(model), 8))
    whole = prefill(author, FIRST + SECOND)

    assert not np.allclose(kv.layers[1][1].numpy(), whole.layers[1][1].numpy(), atol=1e-2)
    assert kv.token_ids is None


def test_what_is_known_of_the_parts_is_kept(tmp_path: Path, model_folder: str) -> None:
    """Frozen tokens of the first, steps of all, and the identity that they share."""
    identity = {"weights": "w", "config.x": "1"}
    first = made(
        tmp_path, "a", kv=contents(num_frozen_tokens=2), num_training_steps=5, identity=identity
    )
    second = made(tmp_path, "b", kv=contents(seed=40), num_training_steps=3, identity=identity)
    built = compose([first, second, first], model_folder)

    assert built.contents.num_tokens == 18
    assert built.contents.num_frozen_tokens == 2
    assert (built.num_training_steps, built.identity) == (13, identity)


def test_an_identity_that_one_lacks_is_not_claimed(tmp_path: Path, model_folder: str) -> None:
    """Nobody knows whose KV the other part is."""
    parts = [made(tmp_path, "a", identity={"weights": "w"}), made(tmp_path, "b")]

    assert compose(parts, model_folder).identity == {}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kv": contents(shape=(6, 1, 4))}, "num_heads 2 and 1"),
        ({"kv": contents(3)}, "num_layers 2 and 3"),
        ({"kv": contents(shape=(6, 2, 2))}, "head_dim 4 and 2"),
        ({"kv": contents(dtype="bfloat16")}, "dtype float32 and bfloat16"),
        ({"block_tokens": 8}, "block_tokens 4 and 8"),
        ({"model": "other"}, "model tiny and other"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parts_of_another_kind_are_named(
    tmp_path: Path, model_folder: str, change: dict[str, Any], sentence: str
) -> None:
    """The field, and both values."""
    parts = [made(tmp_path, "a"), made(tmp_path, "b", **change)]

    with pytest.raises(RefusedError, match=f"cartridges a and b can't be composed: {sentence}"):
        compose(parts, model_folder)


def test_other_weights_are_named(tmp_path: Path, model_folder: str) -> None:
    """Where both know theirs; the model's name does not count then."""
    first = made(tmp_path, "a", identity={"weights": "w", "dtype": "x"})
    same = made(tmp_path, "b", identity={"weights": "w", "dtype": "x"}, model="renamed")
    other = made(tmp_path, "c", identity={"weights": "v", "dtype": "x"})

    compose([first, same], model_folder)
    with pytest.raises(RefusedError, match="can't be composed: another weights: build"):
        compose([first, other], model_folder)


def test_too_long_is_refused(tmp_path: Path, model_folder: str) -> None:
    """With the numbers."""
    parts = [made(tmp_path, "a", kv=contents(shape=(32, 2, 4)))] * 2

    with pytest.raises(InputError, match="they have 64 tokens and the model takes 64"):
        compose(parts, model_folder)


def test_one_alone_is_nothing_to_compose(tmp_path: Path, model_folder: str) -> None:
    """Bad input."""
    with pytest.raises(InputError, match="name 2 to 64 cartridges to compose, not 1"):
        compose([made(tmp_path, "a")], model_folder)
