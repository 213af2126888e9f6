"""``kvkeep cartridge pin``, ``unpin`` and ``export``."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from kvkeep.cartridges.file_format import read_cartridge
from kvkeep.cartridges.registry import Registry
from kvkeep.cli.main import main
from tests.unit.cartridges.made import contents, draft


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A registry with two cartridges."""
    with Registry(tmp_path / "library") as registry:
        for seed, name in enumerate(("ships", "whales")):
            registry.register_contents(draft(name), contents(seed=seed, num_frozen_tokens=1))
    return tmp_path / "library"


def run(library: Path, command: str, *args: object) -> Result:
    return CliRunner().invoke(
        main, ["cartridge", command, *map(str, args), "--library", str(library)]
    )


def pinned(library: Path) -> list[str]:
    listed: Any = json.loads(run(library, "ls", "--json").stdout)["cartridges"]
    return [each["manifest"]["cartridge_id"] for each in listed if each["is_pinned"]]


def test_what_is_pinned_is_kept(library: Path) -> None:
    """Several at once; rm refuses them until they are unpinned."""
    result = run(library, "pin", "ships", "whales")
    assert (result.exit_code, result.stdout) == (0, "pinned ships\npinned whales\n")
    assert run(library, "rm", "ships").exit_code == 2
    assert run(library, "unpin", "ships").stdout == "unpinned ships\n"

    assert pinned(library) == ["whales"]
    assert run(library, "rm", "ships").exit_code == 0


@pytest.mark.parametrize("command", ["pin", "unpin"])
def test_what_is_not_there_can_t_be_pinned(library: Path, command: str) -> None:
    """One sentence, and nothing else changes."""
    result = run(library, command, "bees", "ships")

    assert result.exit_code == 2
    assert "there is no cartridge 'bees'" in result.stderr
    assert pinned(library) == []


def test_pins_stay_within_the_host_s_budget(library: Path) -> None:
    """The sentence says by how much, and what to do."""
    with Registry(library) as registry:
        registry.set_budget("host", 1)
    result = run(library, "pin", "ships")

    assert result.exit_code == 2
    assert "the host's budget is 1: unpin another, or raise the budget" in result.stderr


def test_a_cartridge_is_exported_as_it_is(library: Path, tmp_path: Path) -> None:
    """Byte by byte, under its own id."""
    path = tmp_path / "copy.safetensors"
    result = run(library, "export", "ships", path)
    with Registry(library) as registry:
        entry = registry.get("ships")

    assert entry is not None
    assert result.stdout == f"exported ships: 6 tokens, {path}\n"
    assert path.read_bytes() == entry.path.read_bytes()


def test_others_read_what_is_exported_for_them(library: Path, tmp_path: Path) -> None:
    """A .pt file, frozen tokens apart, without running anything."""
    path = tmp_path / "ships.pt"
    assert run(library, "export", "ships", path).exit_code == 0
    saved = torch.load(path, weights_only=True)
    with Registry(library) as registry:
        wanted = registry.load("ships").contents.layers[0][0].numpy()

    assert [tensor.shape[2] for tensor in saved["frozen_keys"]] == [1, 1]
    whole = torch.cat([saved["frozen_keys"][0], saved["trainable_keys"][0]], dim=2)[0]
    assert torch.equal(whole.transpose(0, 1), torch.from_numpy(wanted.copy()))


def test_nothing_is_replaced_unasked(library: Path, tmp_path: Path) -> None:
    """With --force it is, at once."""
    path = tmp_path / "copy.safetensors"
    path.write_text("mine")
    refused = run(library, "export", "ships", path)
    assert (refused.exit_code, path.read_text()) == (2, "mine")
    assert "is there already: name another, or add --force" in refused.stderr

    assert run(library, "export", "ships", path, "--force").exit_code == 0
    assert read_cartridge(path).head.manifest.cartridge_id == "ships"


def test_a_damaged_one_is_not_exported(library: Path, tmp_path: Path) -> None:
    """Nothing is left behind."""
    with Registry(library) as registry:
        entry = registry.get("ships")
    assert entry is not None
    entry.path.chmod(0o600)
    payload = bytearray(entry.path.read_bytes())
    payload[-1] ^= 1
    entry.path.write_bytes(payload)

    out = tmp_path / "out"
    out.mkdir()
    for name in ("a.safetensors", "a.pt"):
        result = run(library, "export", "ships", out / name)
        assert result.exit_code == 2
        assert "checksum" in result.stderr
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "name", "said"),
    [
        ("bees", "a.pt", "is neither a file nor a registered cartridge"),
        ("ships", "a.bin", "says no form: let it end in .safetensors or .pt"),
        ("ships", "missing/a.pt", "name another place"),
        ("ships", "missing/a.safetensors", "name another place"),
    ],
)
def test_what_is_wrong_is_said(
    library: Path, tmp_path: Path, target: str, name: str, said: str
) -> None:
    """One sentence that says what to do."""
    result = run(library, "export", target, tmp_path / name)

    assert result.exit_code == 2
    assert said in result.stderr


def test_a_checkpoint_has_to_be_registered_first(library: Path, tmp_path: Path) -> None:
    """It does not say what it is."""
    path = tmp_path / "ships.pt"
    run(library, "export", "ships", path)
    result = run(library, "export", path, tmp_path / "b.safetensors")

    assert result.exit_code == 2
    assert "register it first" in result.stderr
