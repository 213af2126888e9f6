"""Models are loaded, or refused in one sentence."""

from pathlib import Path

import pytest
import torch

from kvkeep.authoring.models import check_supported, choose_device, load_author
from kvkeep.model.errors import InputError
from tests.unit.authoring.tiny import tiny_model, write_config, write_tiny


def test_a_folder_is_loaded_as_engines_would(tmp_path: Path) -> None:
    """KV of a float32 model is in 16 bits unless somebody asks for more; weights stay still."""
    folder = str(write_tiny(tmp_path / "m"))
    author = load_author(folder, device="cpu")
    wide = load_author(folder, device="cpu", dtype="float32")

    assert (author.dtype, author.model.dtype) == ("bfloat16", torch.bfloat16)
    assert (wide.dtype, wide.model.dtype) == ("float32", torch.float32)
    assert not any(weight.requires_grad for weight in author.model.parameters())
    assert (author.tokens_max, author.name) == (1024, folder)


def test_it_may_compute_in_more_bits_than_it_keeps(tmp_path: Path) -> None:
    """As training on a CPU does."""
    folder = str(write_tiny(tmp_path / "m"))
    author = load_author(folder, device="cpu", computes_in="float32")

    assert (author.dtype, author.model.dtype) == ("bfloat16", torch.float32)
    assert author.identity["dtype"] == "torch.bfloat16"


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    """With what transformers said."""
    folder = write_config(tmp_path / "m", hidden_size=32)

    with pytest.raises(InputError, match="can't be opened by transformers"):
        load_author(str(folder), device="cpu")


def test_layers_with_windows_are_refused() -> None:
    """They don't keep the KV of every token."""
    with pytest.raises(InputError, match="mistral has layers that don't attend to every token"):
        check_supported(tiny_model("mistral", sliding_window=16))
    check_supported(tiny_model("mistral", sliding_window=None))
    check_supported(tiny_model("qwen2"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    """Rather than computing for hours on the CPU."""
    with pytest.raises(InputError, match="torch sees no GPU here"):
        choose_device("cuda")
    assert choose_device("auto") == "cpu"
