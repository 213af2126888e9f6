"""What decides a model's KV, said as an engine's connector says it."""

from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch
import transformers

from kvkeep.authoring.identity import identity_of_model
from kvkeep.cartridges.manifest import identity_of
from kvkeep.connector.identity import derive_layout, describe
from kvkeep.connector.settings import ConnectorSettings
from tests.unit.authoring.tiny import write_tiny
from tests.unit.connector.configs import make_cache_config, make_config, make_spec


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user cache folder of the test's own."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path / "cache"))


def engine_says(folder: Path, config: Any) -> dict[str, str]:
    """What the connector of an engine with this model says, without what is not of a cartridge."""
    engine = make_config(folder, dtype=torch.bfloat16)
    engine.model_config.hf_config = config
    layout = derive_layout(engine, make_cache_config(make_spec()))
    return identity_of(describe(engine, layout, ConnectorSettings(socket="s")))


def test_an_engine_of_the_model_says_the_same(tmp_path: Path) -> None:
    """Every part, long ones cut in the same way."""
    folder = write_tiny(tmp_path / "m", architectures=["Llama" * 80])
    config = transformers.AutoConfig.from_pretrained(folder)
    mine = identity_of_model(str(folder), config, "bfloat16")

    assert mine["weights"].endswith(" auto {}")
    assert mine == engine_says(folder, config)


def test_other_weights_and_dtypes_are_told_apart(tmp_path: Path) -> None:
    """By the bytes, whatever the model is called."""
    folder = write_tiny(tmp_path / "m")
    config = transformers.AutoConfig.from_pretrained(folder)
    before = identity_of_model(str(folder), config, "bfloat16")
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"!")
    after = identity_of_model(str(folder), config, "bfloat16")

    assert {name for name in before if before[name] != after[name]} == {"weights"}
    assert identity_of_model(str(folder), config, "float16")["dtype"] == "torch.float16"


def test_what_can_t_be_known_is_not_said(tmp_path: Path) -> None:
    """Quantized weights are loaded in other ways; weights that are not here have no bytes."""
    folder = write_tiny(tmp_path / "m")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": "gptq"}

    assert identity_of_model(str(folder), config, "bfloat16") == {}
    assert identity_of_model(str(tmp_path), config, "bfloat16") == {}
