"""`kvkeep down` where nothing runs."""

from pathlib import Path

from click.testing import CliRunner

from kvkeep.cli.main import main


def test_down_is_idempotent(tmp_path: Path) -> None:
    """Stopping what is not up is no error, for a person as for a machine."""
    plain = CliRunner().invoke(main, ["down", "s", "--state-dir", str(tmp_path)])
    machine = CliRunner().invoke(main, ["down", "s", "--state-dir", str(tmp_path), "--json"])

    assert (plain.exit_code, plain.output) == (0, "nothing was up\n")
    assert (machine.exit_code, machine.output) == (0, '{"state": "down", "stopped": []}\n')
