"""LoRA adapters: named by their bytes, and only while it is sure which bytes the engine holds."""

import os
from pathlib import Path

import platformdirs
import pytest
from vllm.lora.request import LoRARequest

from kvkeep.connector.identity import Unsupported
from kvkeep.connector.lora import Adapters, lora_identity


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user cache folder of the test's own."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path / "cache"))


def adapter(
    folder: Path, weights: bytes = b"a", config: bytes = b'{"lora_alpha": 8}', number: int = 1
) -> LoRARequest:
    """A request's adapter in this folder."""
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_bytes(config)
    return LoRARequest(folder.name, number, str(folder))


def test_an_adapter_is_its_weights_and_its_configuration(tmp_path: Path) -> None:
    """A copy is the same adapter; other weights, or another scale for them, make another."""
    mine = lora_identity(adapter(tmp_path / "mine"))

    assert lora_identity(adapter(tmp_path / "copy")) == mine
    assert lora_identity(adapter(tmp_path / "weights", weights=b"b")) != mine
    assert lora_identity(adapter(tmp_path / "scale", config=b'{"lora_alpha": 16}')) != mine


def test_weights_of_every_format_count(tmp_path: Path) -> None:
    """Which of them is read depends on names; a file of another format beside it may be it."""
    mine = adapter(tmp_path / "mine")
    (tmp_path / "mine" / "adapter_model.safetensors").rename(tmp_path / "mine" / "x.safetensors")
    (tmp_path / "mine" / "adapter_model.bin").write_bytes(b"b")
    before = lora_identity(mine)
    (tmp_path / "mine" / "adapter_model.bin").write_bytes(b"c")

    assert lora_identity(mine) != before


def test_how_experts_are_laid_out_counts(tmp_path: Path) -> None:
    """The same bytes are read in another way if the request says so."""
    mine = adapter(tmp_path / "mine")
    before = lora_identity(mine)
    mine.is_3d_lora_weight = True

    assert lora_identity(mine) != before


@pytest.mark.parametrize("missing", ["folder", "adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_that_cannot_be_read_is_refused(tmp_path: Path, missing: str) -> None:
    """Without its bytes nobody knows what an adapter is."""
    request = adapter(tmp_path / "mine")
    if missing == "folder":
        request.lora_path = "someone/adapter"
    else:
        (tmp_path / "mine" / missing).unlink()

    with pytest.raises(Unsupported, match="adapter"):
        lora_identity(request)
    with pytest.raises(Unsupported, match="adapter"):
        Adapters().identify(request)


def test_an_adapter_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later requests are named from memory."""
    request, adapters = adapter(tmp_path / "mine"), Adapters()
    first = adapters.identify(request)
    monkeypatch.setattr("kvkeep.connector.lora.lora_identity", lambda _: "read again")

    assert adapters.identify(request) == first


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"]
)
def test_an_adapter_whose_files_changed_is_passed_by(tmp_path: Path, name: str) -> None:
    """Nobody tells whether the engine has read them again; also not once they are put back."""
    request, adapters = adapter(tmp_path / "mine"), Adapters()
    adapters.identify(request)
    file = tmp_path / "mine" / name
    before = file.stat() if file.exists() else None
    file.write_bytes(b"b")
    if before is not None:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert not adapters.is_sure(request)
    for _ in range(2):
        with pytest.raises(Unsupported, match="another name"):
            adapters.identify(request)


def test_an_adapter_that_is_loaded_in_place_is_passed_by(tmp_path: Path) -> None:
    """The engine replaces what it holds under this number, for requests in flight too."""
    request, adapters = adapter(tmp_path / "mine"), Adapters()
    adapters.identify(request)
    reloaded = adapter(tmp_path / "new", weights=b"b")
    reloaded.load_inplace = True

    with pytest.raises(Unsupported, match="in place"):
        adapters.identify(reloaded)
    assert not adapters.is_sure(request)


def test_a_number_given_twice_is_passed_by(tmp_path: Path) -> None:
    """The engine goes by numbers: the second adapter may never have been read."""
    adapters = Adapters()
    adapters.identify(adapter(tmp_path / "one"))

    with pytest.raises(Unsupported):
        adapters.identify(adapter(tmp_path / "two", weights=b"b"))


def test_adapters_do_not_disturb_each_other(tmp_path: Path) -> None:
    """What happened to one number says nothing about another, nor about no adapter."""
    adapters = Adapters()
    one, two = (adapter(tmp_path / str(number), number=number) for number in (1, 2))
    identity = adapters.identify(two)
    adapters.identify(one)
    (tmp_path / "1" / "adapter_config.json").unlink()

    assert not adapters.is_sure(one)
    assert adapters.identify(two) == identity
    assert adapters.is_sure(None)
