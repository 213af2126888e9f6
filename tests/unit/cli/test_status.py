"""How a status looks to a person; asking a real daemon is in tests/integration."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvkeep.cli.main import main
from kvkeep.cli.status import readable_bytes, show
from kvkeep.daemon.sequences.figures import COUNTERS as SEQUENCE_COUNTERS
from kvkeep.stack.process import ProcessId, this_process
from kvkeep.stack.record import EngineRecord, StackRecord, write_record

STATUS: dict[str, Any] = {
    "version": "0.1.0",
    "generation": 3,
    "pool": {
        "path": "/dev/shm/a.pool",
        "bytes": 2 << 30,
        "block_bytes": 737280,
        "layout": {"block_tokens": 32, "dtype": "bfloat16"},
    },
    "workers": 2,
    "gauges": {
        "slots": 2900.0,
        "slots_ready": 17.0,
        "read_leases": 1.0,
        "write_leases": 2.0,
        "uptime_s": 61.2,
    },
    "counters": {"blocks_stored": 12345, "blocks_evicted": 0},
}


def test_a_person_sees_what_is_held_and_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes have units; counters that never moved are left out."""
    show(STATUS)
    text = capsys.readouterr().out

    assert "17 ready of 2900, 720.0 KiB each, 32 tokens" in text
    assert "12,345" in text
    assert "blocks_evicted" not in text


def test_a_path_is_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """A path stands whole on its line, however narrow the terminal is."""
    path = f"/dev/shm/{'long-' * 40}.pool"
    show(STATUS | {"pool": STATUS["pool"] | {"path": path}})

    assert f"  {path}, 2.0 GiB\n" in capsys.readouterr().out


def test_sequences_have_a_line_where_they_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """And none where they are not."""
    counters = dict.fromkeys(SEQUENCE_COUNTERS, 0) | {"sequences_put": 3, "sequences_appended": 4}
    gauges = {"sequences": 2, "sequence_bytes": 5 << 20, "sequence_transfer_bytes": 0}
    told = {"port": 7000, "pid": 1, "gauges": gauges, "counters": counters}
    show(STATUS | {"sequences": told})
    with_them = capsys.readouterr().out
    show(STATUS | {"sequences": None})

    assert "2, 5.0 MiB, on port 7000; 7 written, 0 read" in with_them
    assert "sequences" not in capsys.readouterr().out


def test_a_daemon_without_engines_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first engine there is no layout, and that is not an error."""
    pool = STATUS["pool"] | {"layout": None, "block_bytes": 0}

    show(STATUS | {"pool": pool})

    assert "no engine has come" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2 << 40, "2.0 TiB")]
)
def test_sizes_are_readable(num_bytes: int, text: str) -> None:
    """The largest unit that leaves at least one."""
    assert readable_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--socket", "/nowhere/d.sock"], "start one with kvkeep daemon"),
        (["--socket", "a", "--url", "b"], "name one daemon"),
        (["s", "--url", "b"], "name one daemon"),
        (["--state-dir", "a"], "name the stack too"),
        (["s", "--state-dir", "/nowhere"], "No stack is up or starting in /nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(arguments: list[str], sentence: str) -> None:
    """Nobody there, or two places to ask."""
    done = CliRunner().invoke(main, ["status", *arguments])

    assert done.exit_code == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"state": "failed", "error": "engine a ended: no memory"}, "engine a ended: no memory"),
        ({"state": "failed"}, "failed, and nothing says why: see its logs"),
        ({"state": "starting"}, "The stack s is starting: `kvkeep wait s` waits for it."),
        ({"supervisor": ProcessId(1, 0)}, "`kvkeep down s` clears what it left"),
    ],
)
def test_a_stack_that_is_not_up_says_why(
    tmp_path: Path, fields: dict[str, Any], sentence: str
) -> None:
    """Asked by its name, a stack that failed or crashed tells the reason."""
    known: dict[str, Any] = {"state": "ready", "supervisor": this_process()}
    write_record(tmp_path, StackRecord(name="s", model="m", **(known | fields)))

    done = CliRunner().invoke(main, ["status", "s", "--state-dir", str(tmp_path)])

    assert done.exit_code == 2
    assert sentence in done.stderr


def test_a_stack_without_a_daemon_shows_its_engines(tmp_path: Path) -> None:
    """There is no pool to tell of, and that is no error."""
    engines = [EngineRecord(name="a", url="http://127.0.0.1:1", pid=None)]
    write_record(
        tmp_path,
        StackRecord(name="s", state="ready", supervisor=this_process(), model="m", engines=engines),
    )

    person = CliRunner().invoke(main, ["status", "s", "--state-dir", str(tmp_path)])
    machine = CliRunner().invoke(main, ["status", "s", "--state-dir", str(tmp_path), "--json"])

    assert (person.exit_code, person.output.splitlines()[0]) == (0, "stack s is ready")
    assert json.loads(machine.output)["stack"]["engines"] == {"a": "http://127.0.0.1:1"}
