"""A text becomes a cartridge."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kvkeep.adapters.dynamic_cache import to_dynamic_cache
from kvkeep.authoring.build import build
from kvkeep.authoring.models import load_author
from kvkeep.model.errors import InputError
from tests.unit.authoring.tiny import TEXT, write_tiny


def test_logits_with_the_cartridge_are_those_with_the_text(tmp_path: Path) -> None:
    """The canary, from the model's files on."""
    folder = str(write_tiny(tmp_path / "m"))
    built = build(TEXT, folder, device="cpu", dtype="float32")
    author = load_author(folder, device="cpu", dtype="float32")
    asked = author.tokenizer("Who?")["input_ids"]
    ids = author.tokenizer(TEXT)["input_ids"]
    cache = to_dynamic_cache(built.contents)
    behind = author.model(input_ids=torch.tensor([asked]), past_key_values=cache).logits[0]
    whole = author.model(input_ids=torch.tensor([ids + asked])).logits[0, len(ids) :]

    assert built.contents.token_ids is not None
    assert built.contents.token_ids.tolist() == ids
    assert torch.allclose(behind, whole, atol=1e-4)
    assert built.identity["dtype"] == "torch.float32"


def test_a_chat_s_beginning_is_built(tmp_path: Path) -> None:
    """Its header too."""
    folder = str(write_tiny(tmp_path / "m"))
    plain = build("ships", folder, device="cpu").contents
    chat = build("ships", folder, role="user", device="cpu").contents

    assert plain.dtype == "bfloat16"
    assert chat.num_tokens == plain.num_tokens + len("[user]")
    assert np.array_equal(chat.token_ids[-5:], plain.token_ids)  # type: ignore[index,arg-type]


def test_a_text_beyond_the_model_is_refused(tmp_path: Path) -> None:
    """Before anything is computed."""
    folder = str(write_tiny(tmp_path / "m", max_position_embeddings=32))

    with pytest.raises(InputError, match="the text has 33 tokens and the model takes 32"):
        build("a" * 33, folder, device="cpu")
