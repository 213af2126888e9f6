"""How flags reach the stack, and how a watched stack ends."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvkeep.cli import up as module
from kvkeep.cli.main import main
from kvkeep.model.errors import UnavailableError
from kvkeep.stack.process import this_process
from kvkeep.stack.record import StackRecord, read_record
from kvkeep.stack.spec import EngineSpec, StackSpec
from kvkeep.stack.supervisor import Stack


@pytest.fixture
def specs(monkeypatch: pytest.MonkeyPatch) -> list[StackSpec]:
    """What `up` would have run."""
    ran: list[StackSpec] = []

    def run(spec: StackSpec, as_json: bool, quiet: bool) -> int:
        ran.append(spec)
        return 0

    monkeypatch.setattr(module, "_run", run)
    return ran


def test_flags_reach_their_fields(
    specs: list[StackSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flag beats the environment and the file; `--set` reaches every other field."""
    monkeypatch.setenv("KVBM_SERVER_PORT", "1")
    file = tmp_path / "s.yaml"
    file.write_text("engines: [{name: a, port: 2}]\n")

    result = CliRunner().invoke(
        main,
        [
            *("up", str(file), "--model", "o/m", "--port", "3", "--pool-bytes", "1GiB"),
            *("--start-timeout", "7", "--state-dir", "/s", "--set", "engines.a.dtype=float32"),
        ],
    )

    (spec,) = specs
    assert result.exit_code == 0
    assert (spec.model, spec.engines[0].port, spec.daemon.pool_bytes) == ("o/m", 3, 1 << 30)
    assert (spec.start_timeout_s, spec.state_dir) == (7, "/s")
    assert spec.engines[0].dtype == "float32"


def test_a_wrong_flag_is_one_sentence(specs: list[StackSpec], tmp_path: Path) -> None:
    """Nothing is started for a value that can't be."""
    file = tmp_path / "s.yaml"
    file.write_text("engines: [{name: a}]\n")

    result = CliRunner().invoke(main, ["up", str(file), "--pool-bytes", "much"])

    assert (result.exit_code, specs) == (2, [])
    assert result.stderr.startswith("kvkeep up: daemon.pool_bytes: 'much' is not a size")


def test_no_file_is_one_sentence(specs: list[StackSpec]) -> None:
    """A file that is not there is named."""
    result = CliRunner().invoke(main, ["up", "none.yaml"])

    assert result.exit_code == 2
    assert result.stderr.startswith("kvkeep up: none.yaml can't be read")


def test_a_stack_that_ends_by_a_failure_leaves_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks later is told which engine ended, and why."""

    def end(stack: Any) -> None:
        raise UnavailableError("engine a ended: it was killed")

    monkeypatch.setattr(module, "watch", end)
    monkeypatch.setattr(Stack, "_start", lambda stack: None)
    spec = StackSpec(name="s", state_dir=str(tmp_path), engines=[EngineSpec(name="a")])

    with pytest.raises(UnavailableError):
        module._run(spec, as_json=True, quiet=True)

    record = read_record(tmp_path)
    assert record is not None
    assert (record.state, record.error) == ("failed", "engine a ended: it was killed")


def test_a_detached_stack_gets_the_same_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs behind is told every flag, under the fields' names."""
    commands: list[list[str]] = []

    class Popen:
        pid = 0

        def __init__(self, command: list[str], **_: object) -> None:
            commands.append(command)

        def poll(self) -> int:
            return 2

        def terminate(self) -> None: ...

        def wait(self) -> int:
            return 2

    monkeypatch.setattr("subprocess.Popen", Popen)
    monkeypatch.setattr(module, "check_machine", lambda spec: None)
    monkeypatch.setattr(module, "check_model", lambda name: None)
    file = tmp_path / "s.yaml"
    file.write_text(f"engines: [{{name: a}}]\nstate_dir: {tmp_path}/state\n")

    result = CliRunner().invoke(main, ["up", str(file), "--detach", "--port", "3", "--quiet"])

    assert commands[0][2:] == [
        *("kvkeep", "up", str(file), "--quiet", "--json", "--set", "engines.0.port=3"),
    ]
    assert (result.exit_code, result.stderr) == (2, "kvkeep up: it wrote nothing\n")


def test_a_ready_stack_is_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A script reads the addresses from one line."""
    record = StackRecord(name="s", state="ready", supervisor=this_process(), model="m", engines=[])

    module._print(record, Path("/f"), as_json=True)

    assert json.loads(capsys.readouterr().out)["state"] == "ready"


@pytest.mark.parametrize("flags", [[], ["--detach"]])
@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (["--state-dir", "/dev/null/x"], "The state folder /dev/null/x can't be used (Not a dir"),
        (["--set", "daemon.settings.pool=/dev/null/x"], "/dev/null is not a folder; choose"),
        (["--set", "daemon.settings.pool=/dev"], "daemon.settings.pool = /dev: it is not a file"),
        (["--set", "daemon.socket=/proc/zz/a.sock"], "/proc/zz can't be made"),
        (["--set", "state_dir=~nobody-has-this-name/x"], "there can be no such path"),
    ],
)
def test_a_path_that_can_t_be_is_one_sentence(
    tmp_path: Path, flags: list[str], option: list[str], sentence: str
) -> None:
    """It is refused before anything starts, and `down` finds nothing to stop after it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    file = tmp_path / "s.yaml"
    file.write_text(
        f"model: {tmp_path}/model\nstate_dir: {tmp_path}/state\n"
        "daemon: {pool_bytes: 16MiB}\nengines: [{name: a, kv_cache_bytes: 1MiB}]\n"
    )

    up = CliRunner().invoke(main, ["up", str(file), "--quiet", *flags, *option])
    down = CliRunner().invoke(main, ["down", str(file)])

    assert up.exit_code == 2
    assert sentence in up.stderr
    assert up.stderr.count("\n") == 1
    assert (down.exit_code, down.output) == (0, "nothing was up\n")
