"""`kvkeep wait` for stacks that are ready, and for those that never will be."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvkeep.cli.main import main
from kvkeep.stack import record as records
from kvkeep.stack.process import this_process
from kvkeep.stack.record import StackRecord, write_record


def test_a_ready_stack_is_shown(tmp_path: Path) -> None:
    """Waiting for a stack that is ready prints it and ends with exit code 0."""
    write_record(
        tmp_path, StackRecord(name="s", state="ready", supervisor=this_process(), model="m")
    )

    plain = CliRunner().invoke(main, ["wait", "s", "--state-dir", str(tmp_path), "--quiet"])
    machine = CliRunner().invoke(
        main, ["wait", "s", "--state-dir", str(tmp_path), "--quiet", "--json"]
    )

    assert (plain.exit_code, plain.stdout.splitlines()[0]) == (0, "stack s is ready")
    assert (machine.exit_code, json.loads(machine.stdout)["name"]) == (0, "s")


def test_no_stack_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for what nobody starts ends with exit code 2 and says so."""
    monkeypatch.setattr(records, "APPEAR_S", 0.0)

    result = CliRunner().invoke(main, ["wait", "s", "--state-dir", str(tmp_path)])

    assert result.exit_code == 2
    assert result.stderr == (
        f"kvkeep wait: No stack is up or starting in {tmp_path}: start it with `kvkeep up`.\n"
    )
