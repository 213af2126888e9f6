"""The group: what it lists, what it imports, and how errors end."""

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from kvkeep.cli import main as cli
from kvkeep.cli.main import COMMANDS, main
from kvkeep.model.errors import InputError, InvariantError, UnavailableError


@pytest.mark.parametrize("name", COMMANDS)
def test_every_listed_command_is_there(name: str) -> None:
    """A name in the table can be run, and explains itself."""
    result = CliRunner().invoke(main, [name, "--help"])

    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_the_help_lists_every_command() -> None:
    """A newcomer finds all commands in one place."""
    output = CliRunner().invoke(main, ["--help"]).output

    assert [name for name in COMMANDS if f"\n  {name} " not in output] == []


def test_an_unknown_command_is_bad_input() -> None:
    """A typing mistake ends with exit code 2 and says so."""
    result = CliRunner().invoke(main, ["pu"])

    assert result.exit_code == 2
    assert "No such command 'pu'" in result.output


@pytest.mark.parametrize("error", [InputError("mend it."), UnavailableError("mend it.")])
def test_what_is_raised_on_purpose_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A user sees one sentence on stderr and exit code 2, no traceback."""
    fail_with(monkeypatch, error)

    result = CliRunner().invoke(main, ["fail"])

    assert (result.exit_code, result.stdout, result.stderr) == (2, "", "kvkeep fail: mend it.\n")


def test_a_fault_of_kvkeep_s_own_is_no_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """An invariant that broke shows where, for it is not the user's to mend."""
    fail_with(monkeypatch, InvariantError("impossible"))

    assert isinstance(CliRunner().invoke(main, ["fail"]).exception, InvariantError)


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    @click.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "COMMANDS", {"fail": "module:fail"})
    monkeypatch.setattr("importlib.import_module", lambda name: type("Module", (), {"fail": fail}))


def test_a_command_s_imports_wait_for_it() -> None:
    """Asking for the version loads neither the network nor the checks."""
    program = (
        "import sys; from kvkeep.cli.main import main; main(['--version'], standalone_mode=False);"
        "print(sorted({'httpx', 'numpy', 'kvkeep.stack', 'kvkeep.validate'} & set(sys.modules)))"
    )

    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30
    )

    assert result.stdout.splitlines()[-1] == "[]"
