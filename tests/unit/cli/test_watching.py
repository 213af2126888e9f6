"""How a daemon that ends is restarted while the engines are watched, with made-up parts."""

from typing import Any

import pytest

from kvkeep.cli import watching as module
from kvkeep.model.errors import UnavailableError


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCH_S", 0)


class HandClock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.time_s = 0.0

    def now_s(self) -> float:
        return self.time_s


class FakePart:
    """A part that ended; a daemon whose restarts go by a plan, one answer a look."""

    def __init__(self, name: str, *answers: bool | str) -> None:
        self.name = self.title = name
        self.process = self
        self.answers = list(answers)
        self.num_begun = 0

    def why_failed(self) -> str:
        return "it was killed"

    def begin_again(self) -> None:
        self.num_begun += 1

    def is_restarted(self) -> bool:
        answer = self.answers.pop(0) if self.answers else "no port"
        if isinstance(answer, str):
            raise UnavailableError(answer)
        return answer


class FakeStack:
    """A stack whose parts end by a plan, one list a look."""

    def __init__(self, daemon: FakePart | None, *rounds: list[FakePart]) -> None:
        self.rounds = list(rounds)
        self.daemon, self.has_daemon = daemon, daemon is not None
        self.servers: list[FakePart] = []

    def ended(self) -> list[FakePart]:
        return self.rounds.pop(0)


def test_an_engine_that_ends_ends_the_stack() -> None:
    """Whoever watches is told which engine ended, and why; a stack needs no daemon."""
    stack: Any = FakeStack(None, [], [FakePart("a")])

    with pytest.raises(UnavailableError, match="a ended: it was killed"):
        module.watch(stack)


def test_a_tiers_server_that_ends_is_restarted_beside_the_daemon(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It costs neither the daemon nor an engine."""
    daemon, server = FakePart("daemon"), FakePart("valkey-server", False, True)
    stack: Any = FakeStack(daemon, [server], [], [], [], [FakePart("a")])
    stack.servers.append(server)

    with pytest.raises(UnavailableError, match="a ended"):
        module.watch(stack)

    assert (daemon.num_begun, server.num_begun) == (0, 1)
    assert "the valkey-server is back" in capsys.readouterr().err


def test_an_engine_is_watched_while_the_daemon_starts() -> None:
    """A daemon that takes its time does not hide that an engine ended."""
    daemon = FakePart("daemon", *[False] * 9)
    stack: Any = FakeStack(daemon, [daemon], [], [], [], [FakePart("a")])

    with pytest.raises(UnavailableError, match="a ended"):
        module.watch(stack)

    assert (daemon.num_begun, len(daemon.answers)) == (1, 7)


def test_a_daemon_that_can_t_be_restarted_costs_no_engine(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A restart that fails is used up; after the last the engines go on, and that is said once."""
    daemon, clock = FakePart("daemon", False, "its port is taken"), HandClock()
    restarts = module.Restarts(daemon, clock)  # type: ignore[arg-type]

    for _ in range(40):
        clock.time_s += 1.0
        restarts.look(has_ended=True)

    said = capsys.readouterr().err
    assert daemon.num_begun == len(module.RESTART_DELAYS_S)
    assert "the daemon is restarted at once: it ended: it was killed" in said
    assert "the daemon is restarted in 1 s: its port is taken" in said
    assert said.count("the daemon stays down, engines go on without it: no port") == 1


def test_a_folder_that_is_gone_costs_no_engine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the system refuses at a restart is a failed restart, like any other."""
    daemon = FakePart("daemon")

    def refuse(part: FakePart) -> None:
        raise NotADirectoryError(20, "Not a directory")

    monkeypatch.setattr(FakePart, "begin_again", refuse)
    restarts = module.Restarts(daemon, HandClock())  # type: ignore[arg-type]
    for _ in range(2):
        restarts.look(has_ended=True)

    assert "is restarted in 1 s: [Errno 20] Not a directory" in capsys.readouterr().err


def test_a_restart_waits_for_its_time() -> None:
    """The second one begins only when its delay is over."""
    daemon, clock = FakePart("daemon", "no"), HandClock()
    restarts = module.Restarts(daemon, clock)  # type: ignore[arg-type]
    for _ in range(5):  # planned, begun, failed and planned again, then not yet due
        restarts.look(has_ended=True)
    before = daemon.num_begun

    clock.time_s = module.RESTART_DELAYS_S[1]
    restarts.look(has_ended=True)

    assert (before, daemon.num_begun) == (1, 2)


def test_a_daemon_that_came_back_runs_on(capsys: pytest.CaptureFixture[str]) -> None:
    """A restart that worked is followed by nothing until the daemon ends again."""
    daemon = FakePart("daemon", True)
    restarts = module.Restarts(daemon, HandClock())  # type: ignore[arg-type]
    restarts.look(has_ended=True)
    for _ in range(5):
        restarts.look(has_ended=False)

    assert daemon.num_begun == 1
    assert capsys.readouterr().err.endswith("the daemon is back\n")
