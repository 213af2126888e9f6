"""What tests of the commands that make cartridges have in common: a model, a text, a library."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvkeep.cli.main import main
from tests.unit.authoring.tiny import TEXT, write_tiny


def run(tmp_path: Path, command: str, *args: object) -> Result:
    """``kvkeep cartridge`` over a library in this folder."""
    library = ["--library", str(tmp_path / "library")]
    return CliRunner().invoke(main, ["cartridge", command, *map(str, args), *library])


def told(result: Result) -> Any:
    """What a command that went well printed for a machine."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama's folder."""
    return str(write_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A document."""
    path = tmp_path / "mill.txt"
    path.write_text(TEXT)
    return path
