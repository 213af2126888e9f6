"""A stack for faults is nobody else's, and nothing of it is left."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.stack.record import FolderLock
from kvkeep.validate.self_test import live
from kvkeep.validate.self_test.live import PromptSets, own_spec, spec_of, started_for_faults

STACK = """\
name: mine
model: smollm2
router: {}
daemon: {pool_bytes: 64MiB}
engines:
  - {name: other, connector: none}
  - {name: a, connector_settings: {lease_s: 20}}
  - {name: b}
"""


class FakeStack:
    """Stands for a stack; remembers what it was made of."""

    made: ClassVar[list["FakeStack"]] = []
    fails: ClassVar[BaseException | None] = None

    def __init__(self, spec: Any, *, state_dir: Path, progress: Any) -> None:
        self.spec, self.folder, self.is_running = spec, state_dir, False
        self.engines = {"a": SimpleNamespace(url="http://127.0.0.1:1")}
        self.daemon = SimpleNamespace(metrics_url="http://127.0.0.1:2", pool="/dev/shm/none")
        FakeStack.made.append(self)

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "log").write_text("why")
        if self.fails is not None:
            raise self.fails
        self.is_running = True

    def stop(self) -> None:
        self.is_running = False


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeStack]:
    """No real stack is started, and folders are the test's."""
    monkeypatch.setattr(live, "Stack", FakeStack)
    monkeypatch.setattr(FakeStack, "made", [])
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return FakeStack


def files_in(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


def test_no_prompt_serves_two_purposes() -> None:
    """What is struck, what sets the noise floor and what is held out have no prompt in common."""
    sets = PromptSets.made(20, seed=42)

    parts = [sets.struck, sets.foreign, sets.floor, sets.held_out]
    texts = [{prompt.text for prompt in part} for part in parts]
    assert [len(part) for part in texts] == [20, 1, 8, 1000]
    assert len(set.union(*texts)) == 1029


def test_an_own_stack_is_exact_and_loads_whatever_is_there() -> None:
    """One engine, a step for each block, and no planner that would rather compute."""
    spec = own_spec(None, exact=True)

    (engine,) = spec.engines
    assert (engine.max_num_batched_tokens, engine.max_num_seqs) == (engine.block_tokens, 1)
    assert engine.connector_settings["planner"] == "load"
    assert own_spec(None, exact=False).engines[0].max_num_seqs is None


def test_a_stack_file_gives_its_first_engine_with_kvkeep(tmp_path: Path) -> None:
    """Without its router, and with what else the file says."""
    file = tmp_path / "stack.yaml"
    file.write_text(STACK)

    spec = spec_of(file, exact=True)

    assert [engine.name for engine in spec.engines] == ["a"]
    assert spec.engines[0].connector_settings == {"lease_s": 20, "planner": "load"}
    assert (spec.router, spec.exact) == (None, True)


@pytest.mark.parametrize(
    "text",
    [
        STACK.replace("- {name: a, connector_settings: {lease_s: 20}}", "").replace(
            "- {name: b}", ""
        ),
        "name: x\nmodel: smollm2\ndaemon: {enabled: false, socket: /tmp/s}\nengines: [{name: a}]\n",
    ],
    ids=["no engine", "no daemon"],
)
def test_a_stack_without_a_pool_of_its_own_is_refused(tmp_path: Path, text: str) -> None:
    """There would be nothing to plant faults in."""
    file = tmp_path / "stack.yaml"
    file.write_text(text)

    with pytest.raises(InputError, match="no pool to plant faults in"):
        spec_of(file, exact=True)


def test_the_stack_has_a_name_and_a_folder_of_its_own(tmp_path: Path) -> None:
    """So that the user's stack of this file is neither touched nor hidden, and nothing is left."""
    with started_for_faults(own_spec(None, exact=True), quiet=True) as where:
        (stack,) = FakeStack.made
        assert stack.spec.name == "own-self-test"
        assert stack.folder == tmp_path / "kvkeep" / "self-tests" / "own-self-test"
        assert stack.is_running
        assert where.addresses.engine == "http://127.0.0.1:1"

    assert not stack.is_running
    assert files_in(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    """Neither the stack nor its folder."""
    with (
        pytest.raises(KeyboardInterrupt),
        started_for_faults(own_spec(None, exact=True), quiet=True),
    ):
        raise KeyboardInterrupt

    assert not FakeStack.made[0].is_running
    assert files_in(tmp_path) == []


def test_logs_of_a_stack_that_did_not_start_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence that names them must not lead nowhere."""
    monkeypatch.setattr(FakeStack, "fails", UnavailableError("see the log"))

    with (
        pytest.raises(InputError, match="see the log"),
        started_for_faults(own_spec(None, exact=True), quiet=True),
    ):
        pass

    assert [path.name for path in tmp_path.rglob("log")] == ["log"]


def test_the_folder_of_one_that_runs_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second self-test of this name is refused, and takes nothing away from the first."""
    folder = tmp_path / "kvkeep" / "self-tests" / "own-self-test"
    monkeypatch.setattr(FakeStack, "fails", KeyboardInterrupt())

    with (
        FolderLock.taken(folder),
        pytest.raises(KeyboardInterrupt),
        started_for_faults(own_spec(None, exact=True), quiet=True),
    ):
        pass

    assert "log" in files_in(tmp_path)
