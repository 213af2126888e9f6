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
from kvkeep.stack.record import StackRecord
from kvkeep.stack.spec import StackSpec


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


class FakePart:
    """A part that ended."""

    def __init__(self, name: str) -> None:
        self.name = self.title = name
        self.process = self
        self.log = "x.log"
        self.restarts = 0

    def why_failed(self) -> str:
        return "it was killed"

    def restart(self) -> None:
        self.restarts += 1


class FakeStack:
    """A stack whose parts end by a plan."""

    def __init__(self, *rounds: list[FakePart]) -> None:
        self.rounds = list(rounds)
        self.daemon: Any = next((part for ended in rounds for part in ended), None)

    def ended(self) -> list[FakePart]:
        return self.rounds.pop(0)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCH_S", 0)


def test_an_engine_that_ends_ends_the_stack() -> None:
    """Whoever watches is told which engine ended, and why."""
    stack: Any = FakeStack([], [FakePart("a")])

    with pytest.raises(UnavailableError, match="a ended: it was killed"):
        module._watch(stack)


def test_a_daemon_that_ends_is_restarted_a_few_times(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Engines go on without a daemon; one that keeps dying is left alone, and that is said once."""
    daemon = FakePart("daemon")
    stack: Any = FakeStack(*[[daemon]] * 6, [FakePart("a")])

    with pytest.raises(UnavailableError, match="a ended"):
        module._watch(stack)

    assert daemon.restarts == module.DAEMON_RESTARTS_MAX
    assert capsys.readouterr().err.count("the daemon stays down: it was killed") == 1


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
