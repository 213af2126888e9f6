"""What holds in every test: order of stages, shut sockets, time limits, no leaks, no silent skip.

A folder says what its tests may do: sockets are shut except in integration, fault and e2e, and
for tests marked ``engine``, which reach loopback only. Random order and its printed seed come from
pytest-randomly; it shuffles within a stage, for a broken core makes the slower stages pointless.
"""

import collections
import contextlib
import dataclasses
import gc
import multiprocessing.resource_tracker
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

TESTS = Path(__file__).parent
LOOPBACK = ["127.0.0.1", "::1"]
LOOPBACK_FOLDERS = ("integration", "fault", "e2e")
ENGINE_TIMEOUT_S = 300.0

# Executors and event loops wind down just after the last line of a test, on a busy machine seconds
# later; what is left is left for good.
LEAK_GRACE_S = 30.0

# Inherited by every process a test starts, so that a detached one is still known as ours. Not
# KVKEEP_...: those names are settings, and the daemon refuses the ones it does not know.
RUN_VARIABLE = "TEST_RUN_OF_KVKEEP"
RUN_ID = f"{os.getpid()}-{time.perf_counter_ns()}"

# A real engine is three processes, one after the other, each of which reads five thousand
# modules: from their sources that takes twice as long as from bytecode, at every start. So bytecode
# is kept, also on machines whose environment asks for none.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# The same examples each time, so that a change is judged by what it changes; a nightly run draws
# others. No limit of time for one: a busy machine is no defect of the code.
hypothesis.settings.register_profile(
    "kvkeep",
    derandomize=not os.environ.get("NIGHTLY"),
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("kvkeep")

NOT_RUN = "NOT RUN: "
_needs_root: list[str] = []
_deselected: list[str] = []


# --- Stages, marks and limits ------------------------------------------------------------------


def _folder(item: pytest.Item) -> str:
    parts = item.path.relative_to(TESTS).parts if item.path.is_relative_to(TESTS) else ("",)
    return parts[0] if len(parts) > 1 else ""


def _stage(item: pytest.Item) -> int:
    """Rank of a test: 0 in one process, 1 with processes and sockets, 2 with a real engine."""
    if item.get_closest_marker("engine"):
        return 2
    return 1 if _folder(item) in LOOPBACK_FOLDERS else 0


def _is_last(item: pytest.Item) -> bool:
    return item.get_closest_marker("last") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by its folder, then order the stages; pytest-randomly has shuffled before."""
    for item in items:
        folder = _folder(item)
        if folder == "fault":
            item.add_marker(pytest.mark.fault)
        if folder == "e2e":
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.engine)
        if _stage(item) > 0 and not item.get_closest_marker("allow_hosts"):
            item.add_marker(pytest.mark.allow_hosts(LOOPBACK))
        if item.get_closest_marker("engine") and not item.get_closest_marker("timeout"):
            # An engine's start has a limit of its own, in the fixture that starts it.
            item.add_marker(pytest.mark.timeout(ENGINE_TIMEOUT_S, func_only=True))
    # A file's tests stay together, for they share what its fixtures have started.
    places = {path: idx for idx, path in enumerate(dict.fromkeys(item.path for item in items))}
    items.sort(key=lambda item: (_stage(item), places[item.path], _is_last(item)))


# --- Tests that could not run ------------------------------------------------------------------


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what this machine cannot run, and remember it."""
    if item.get_closest_marker("root") and os.geteuid() != 0:
        _needs_root.append(item.nodeid)
        pytest.skip(NOT_RUN + "needs root")
    if item.get_closest_marker("gpu") and not Path("/dev/nvidiactl").exists():
        pytest.skip(NOT_RUN + "needs a GPU")


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Remember what -m or -k left out."""
    _deselected.extend(item.nodeid.split("::")[0] for item in items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List every test that did not run, with the reason."""
    skipped: list[pytest.TestReport] = terminalreporter.stats.get("skipped", [])
    if not skipped and not _deselected:
        return
    terminalreporter.section("NOT RUN")
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        terminalreporter.line(f"{report.nodeid}: {reason.removeprefix('Skipped: ')}")
    for path, count in sorted(collections.Counter(_deselected).items()):
        terminalreporter.line(f"{path}: {count} deselected by this command")
    if _needs_root and _in_ci():
        terminalreporter.line("This run fails: in CI the tests that need root must run.", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a CI run whose tests could not all run for lack of root."""
    if _needs_root and _in_ci() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


# --- Leaks ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Held:
    """What this process and its descendants hold at one moment."""

    threads: frozenset[threading.Thread]
    files: frozenset[str]
    """``fd 12 -> target``: a number that now means something else is new."""
    processes: dict[int, str]
    """Command line by pid; zombies too, for somebody has to wait for them."""
    pools: frozenset[str]
    """Shared-memory files by path."""

    def beyond(self, before: "Held") -> list[str]:
        """Say what is held now and was not then; one line each."""
        threads = self.threads - before.threads
        processes = sorted(self.processes.keys() - before.processes.keys())
        return [
            *(f"thread {thread.name}" for thread in threads if thread.is_alive()),
            *sorted(self.files - before.files),
            *(
                f"process {pid}: {self.processes[pid]}"
                for pid in processes
                # An engine that lives longer may start helpers of its own at any time.
                if not _has_ancestor(pid, before.processes)
            ),
            *(path for path in sorted(self.pools - before.pools) if not _is_anothers(path)),
        ]


def _held(stage: int) -> Held:
    # Searching for detached processes takes 10 ms, so it is done where there may be some. Clients
    # of an engine shared by many tests keep connections: those are judged when the session ends.
    is_shared = stage == 2
    return Held(
        threads=frozenset() if is_shared else frozenset(threading.enumerate()),
        files=frozenset() if is_shared else frozenset(_open_files()),
        processes=_children() | (_processes_of_this_run() if stage > 0 else {}),
        pools=frozenset(str(path) for path in Path("/dev/shm").glob("kvkeep*")),
    )


def _open_files() -> Iterator[str]:
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            target = os.readlink(f"/proc/self/fd/{fd}")
            # pytest points the standard streams elsewhere while it captures them.
            if int(fd) > 2 and not target.startswith("/proc/"):
                yield f"fd {fd} -> {target}"


def _children() -> dict[int, str]:
    pids: list[str] = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            pids += path.read_text().split()
    return {int(pid): _command_line(int(pid)) for pid in pids}


def _processes_of_this_run() -> dict[int, str]:
    """Find the processes that carry this run's mark, wherever their parents went."""
    mark = f"{RUN_VARIABLE}={RUN_ID}".encode()
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        pid = int(path.parent.name)
        with contextlib.suppress(OSError):  # gone, or another user's
            if pid != os.getpid() and mark in path.read_bytes().split(b"\0"):
                found[pid] = _command_line(pid)
    return found


def _command_line(pid: int) -> str:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return "gone"
    return raw.replace(b"\0", b" ").decode(errors="replace").strip()[:200] or "not waited for"


def _has_ancestor(pid: int, ancestors: dict[int, str]) -> bool:
    while pid > 1:
        try:
            # The command in parentheses may hold anything; the parent comes two fields after it.
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
        if pid in ancestors:
            return True
    return False


def _is_anothers(path: str) -> bool:
    """Say whether a pool belongs to somebody outside this test run: then it is not ours to judge.

    That is who has it mapped, or whose pid stands in its name.
    """
    ours = {os.getpid(), *_children(), *_processes_of_this_run()}
    named = {int(number) for number in re.findall(r"\d+", Path(path).name)}
    if any(Path(f"/proc/{pid}").exists() for pid in named - ours - {0}):
        return True
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if int(maps.parent.name) not in ours and path in maps.read_text():
                return True
    return False


def _fail_on_leaks(take: Callable[[], Held], before: Held) -> None:
    end = time.perf_counter() + LEAK_GRACE_S
    while leaks := (after := take()).beyond(before):
        if time.perf_counter() > end:
            for pid in after.processes.keys() - before.processes.keys():
                if not _has_ancestor(pid, before.processes):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)  # so that the next test starts clean
            pytest.fail("left behind:\n  " + "\n  ".join(leaks), pytrace=False)
        gc.collect()
        time.sleep(0.02)


@pytest.fixture(scope="session", autouse=True)
def _no_leaks_of_session() -> Iterator[None]:
    """Nothing that a session's fixtures took is left."""
    os.environ[RUN_VARIABLE] = RUN_ID
    # Python starts it at the first shared memory and keeps it.
    multiprocessing.resource_tracker.ensure_running()
    yield from _no_leaks(stage=1)


@pytest.fixture(scope="module", autouse=True)
def _no_leaks_of_module(
    request: pytest.FixtureRequest, _no_leaks_of_session: None
) -> Iterator[None]:
    """Nothing that a module's fixtures took is left."""
    yield from _no_leaks(stage=2 if _folder(request.node) == "e2e" else 1)


@pytest.fixture(autouse=True)
def _no_leaks_of_test(request: pytest.FixtureRequest, _no_leaks_of_module: None) -> Iterator[None]:
    """Nothing that a test took is left; a shared stack is judged when its module ends."""
    if _stage(request.node) == 2 and _folder(request.node) == "e2e":
        # A test may restart parts of the stack that its module shares.
        yield
    else:
        yield from _no_leaks(_stage(request.node))


def _no_leaks(stage: int) -> Iterator[None]:
    before = _held(stage)
    yield
    _fail_on_leaks(lambda: _held(stage), before)
