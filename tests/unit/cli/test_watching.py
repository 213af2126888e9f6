"""How what ends is restarted while the rest is watched, with made-up parts."""

from collections.abc import Sequence
from typing import Any

import pytest

from kvkeep.cli import watching as module
from kvkeep.model.errors import UnavailableError
from kvkeep.stack.parts import EnginePart


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


class FakeEngine(FakePart, EnginePart):
    """An engine that ended."""

    process: Any = None

    def __init__(self, name: str, *answers: bool | str) -> None:
        FakePart.__init__(self, name, *answers)


class FakeStack:
    """A stack whose parts end by a plan, one list a look."""

    def __init__(self, daemon: FakePart | None, *rounds: Sequence[FakePart]) -> None:
        self.rounds = list(rounds)
        self.restartable = [] if daemon is None else [daemon]
        self.on_demand: Any = None
        self.engines: dict[str, FakePart] = {"a": FakePart("a")}

    def ended(self) -> Sequence[FakePart]:
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
    stack.restartable.append(server)

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
    assert said.count("the daemon stays down, the others go on without it: no port") == 1


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


def test_an_engine_behind_a_router_is_restarted(capsys: pytest.CaptureFixture[str]) -> None:
    """Its end is nobody's end but its own, until every engine is down for good."""
    one, other = FakeEngine("a", False, True), FakeEngine("b", True)
    stack: Any = FakeStack(None, [one], [], [], [other], [], [], [FakePart("stranger")])
    stack.restartable, stack.engines = [one, other], {"a": one, "b": other}

    with pytest.raises(UnavailableError, match="stranger ended"):
        module.watch(stack)

    said = capsys.readouterr().err
    assert (one.num_begun, other.num_begun) == (1, 1)
    assert ("the a is back" in said, "the b is back" in said) == (True, True)


def test_a_stack_without_any_engine_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once no engine is left that could be started, whoever waits for the stack is told why."""
    monkeypatch.setattr(module, "RESTART_DELAYS_S", (0.0,))
    one, other = FakeEngine("a"), FakeEngine("b", *[True] * 20)
    stack: Any = FakeStack(None, *([one] for _ in range(5)), *([one, other] for _ in range(9)))
    stack.restartable, stack.engines = [one, other], {"a": one, "b": other}
    other.answers = [True, "no memory"]

    with pytest.raises(UnavailableError, match="no engine is left: "):
        module.watch(stack)

    assert one.num_begun == other.num_begun == 1
    assert len(stack.rounds) > 0


def test_a_part_that_ran_for_long_has_its_restarts_again() -> None:
    """Rare crashes, weeks apart, never add up to an end."""
    daemon, clock = FakePart("daemon", *[True] * 20), HandClock()
    restarts = module.Restarts(daemon, clock)  # type: ignore[arg-type]
    for _ in range(8):
        for has_ended in (True, False, False):
            restarts.look(has_ended=has_ended)
        clock.time_s += module.STEADY_S

    assert daemon.num_begun == 8
    assert not restarts.has_given_up


def test_engines_on_demand_are_seen_to_instead_of_sleeping() -> None:
    """Orders of the router are heard while nothing else happens."""
    waits: list[float] = []

    class OnDemand:
        def look(self, wait_s: float) -> None:
            waits.append(wait_s)

    stack: Any = FakeStack(None, [], [], [FakePart("a")])
    stack.on_demand = OnDemand()

    with pytest.raises(UnavailableError):
        module.watch(stack)

    assert len(waits) == 3
