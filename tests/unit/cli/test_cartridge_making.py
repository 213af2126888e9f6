"""``kvkeep cartridge build`` and ``compose``: what is made, and what is refused."""

import sys
from pathlib import Path

import pytest

from kvkeep.cartridges.file_format import read_cartridge
from tests.unit.authoring.tiny import TEXT, one_thread
from tests.unit.cartridges.made import contents, written
from tests.unit.cli.makers import model, run, text, told

__all__ = ["model", "one_thread", "text"]


# ---- build


def test_a_text_is_built_and_registered(tmp_path: Path, text: Path, model: str) -> None:
    """With all that is known of it; its checked file lies in the library."""
    options = ("--model", model, "--id", "mill", "--device", "cpu", "--label", "topic=mills")
    found = told(run(tmp_path, "build", text, *options, "--json"))
    manifest = found["manifest"]
    kv = read_cartridge(Path(found["path"])).contents

    assert (manifest["method"], manifest["source"], manifest["model"]) == (
        "prefill",
        "mill.txt",
        model,
    )
    assert (manifest["num_tokens"], manifest["block_tokens"]) == (len(TEXT), 16)
    assert manifest["labels"] == {"topic": "mills"}
    assert manifest["identity"]["dtype"] == "torch.bfloat16"
    assert kv.token_ids is not None
    assert kv.dtype == "bfloat16"


def test_a_person_is_told_in_one_line(tmp_path: Path, text: Path, model: str) -> None:
    """What it is called and how long it is."""
    result = run(tmp_path, "build", text, "--model", model, "--id", "mill", "--device", "cpu")

    assert result.stdout == f"built mill: {len(TEXT)} tokens\n"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"--id": "a b"}, "'a b' can't be an id"),
        ({"--label": "topic"}, "'topic' is no label: write NAME=VALUE"),
        ({"--sign": "/gone/key"}, "/gone/key"),
        ({"--model": "/gone/model"}, "there is no such folder"),
        ({"TEXT": "/gone/text"}, "/gone/text can't be read"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_sentence(
    tmp_path: Path, text: Path, model: str, change: dict[str, str], sentence: str
) -> None:
    """Exit code 2, before anything takes long; nothing is registered."""
    options = {"--model": model, "--id": "mill"} | change
    path = options.pop("TEXT", str(text))
    result = run(tmp_path, "build", path, *(each for pair in options.items() for each in pair))

    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "library").exists()


def test_without_torch_the_command_says_what_to_install(
    tmp_path: Path, text: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other commands do without it."""
    for name in list(sys.modules):
        if name.startswith(("kvkeep.authoring", "kvkeep.adapters")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    result = run(tmp_path, "build", text, "--model", model, "--id", "mill")

    assert result.exit_code == 2
    assert "torch is not installed, which computes KV: pip install kvkeep[vllm]" in result.stderr


# ---- compose


def test_registered_ones_and_files_are_composed(tmp_path: Path, model: str) -> None:
    """In the order in which they are named; no ids, so that they replace no text."""
    first, _ = written(tmp_path, "one", kv=contents(token_ids=range(6)), model=model)
    second, _ = written(tmp_path, "two", kv=contents(seed=30), model=model)
    run(tmp_path, "register", second)
    found = told(run(tmp_path, "compose", first, "two", "--id", "both", "--json"))
    kv = read_cartridge(Path(found["path"])).contents

    assert (found["manifest"]["method"], found["manifest"]["num_tokens"]) == ("composed", 12)
    assert found["manifest"]["source"] == "one.safetensors + two"
    assert kv.token_ids is None
    assert kv.layers[0][1].data == (
        contents().layers[0][1].data.tobytes() + contents(seed=30).layers[0][1].data.tobytes()
    )
    assert kv.layers[0][0].data[:192] == contents().layers[0][0].data
    assert kv.layers[0][0].data[192:] != contents(seed=30).layers[0][0].data


def test_what_does_not_go_together_is_refused_by_name(tmp_path: Path, model: str) -> None:
    """Exit code 2, and the field."""
    first, _ = written(tmp_path, "one", model=model)
    second, _ = written(tmp_path, "two", kv=contents(3), model=model)
    result = run(tmp_path, "compose", first, second, "--id", "both")

    assert result.exit_code == 2
    assert "cartridges one and two can't be composed: num_layers 2 and 3" in result.stderr
