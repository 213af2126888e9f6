"""The rules of conftest.py hold: each is shown to fail a run that breaks it."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent

LEAKS = """
    import os, socket, subprocess, sys, threading
    from pathlib import Path

    held = []

    def test_clean():
        assert True

    def test_thread():
        stop = threading.Event()
        held.append(stop)
        threading.Thread(target=stop.wait, args=(60,), name="left-thread", daemon=True).start()

    def test_file():
        held.append(os.open("/dev/null", os.O_RDONLY))

    def test_process():
        held.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))

    def test_pool():
        Path("/dev/shm/kvkeep-test-of-tests-{letters}").write_bytes(b"")

    def test_foreign_pool():
        Path("/dev/shm/kvkeep-test-of-tests-{pid}").write_bytes(b"")

    def test_socket():
        socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()

    def test_unix_socket():
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).close()
"""

DETACHED = """
    import socket, subprocess
    import pytest

    def test_detached_process():
        subprocess.run("sleep 61 & true", shell=True, check=True)

    def test_loopback():
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname()).close()

    @pytest.mark.filterwarnings("ignore:A test tried to use socket")
    def test_elsewhere():
        # 192.0.2.0/24 is for documentation; the guard refuses before a packet leaves.
        with socket.socket() as client:
            client.connect(("192.0.2.1", 80))
"""

ROOT_ONLY = """
    import os
    import pytest

    os.geteuid = lambda: 1000

    @pytest.mark.root
    def test_mount():
        raise AssertionError("ran")

    def test_other():
        assert True
"""


class Project:
    """A project of a few tests with this one's conftest.py and settings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "tests").mkdir()
        conftest = (TESTS / "conftest.py").read_text()
        # Here everything that is left is left for good.
        conftest = conftest.replace("LEAK_GRACE_S = 30.0", "LEAK_GRACE_S = 0.1")
        (path / "tests" / "conftest.py").write_text(conftest)
        shutil.copy(ROOT / "pyproject.toml", path / "pyproject.toml")

    def add(self, name: str, text: str) -> None:
        """Write one test file."""
        path = self.path / "tests" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))

    def run(self, *args: str, ci: str = "") -> "subprocess.CompletedProcess[str]":
        """Run pytest there and return its output and exit status."""
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-rA", "--tb=short", "-p", "no:cacheprovider", *args],
            cwd=self.path,
            env={**os.environ, "CI": ci},
            capture_output=True,
            text=True,
            check=False,
            timeout=150,
        )


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """An empty project."""
    return Project(tmp_path)


def test_what_a_test_leaves_behind_fails_it(project: Project) -> None:
    """A thread, an open file, a process or a pool left by a test is an error that names it."""
    letters = "".join(chr(ord("a") + int(digit)) for digit in str(os.getpid()))
    leaks = LEAKS.replace("{pid}", str(os.getpid())).replace("{letters}", letters)
    project.add("unit/test_leaks.py", leaks)
    pools = [Path(f"/dev/shm/kvkeep-test-of-tests-{end}") for end in (letters, os.getpid())]
    try:
        output = project.run("-k", "not socket and not clean").stdout
    finally:
        for pool in pools:
            pool.unlink(missing_ok=True)

    for name in ("thread", "file", "process", "pool"):
        assert f"ERROR tests/unit/test_leaks.py::test_{name}" in output
    assert "thread left-thread" in output
    assert "-> /dev/null" in output
    assert "-c input()" in output
    assert str(pools[0]) in output
    # This process lives outside of that run, and the pool bears its pid.
    assert str(pools[1]) not in output


def test_sockets_are_shut_but_for_unix_ones(project: Project) -> None:
    """A unit test cannot open an internet socket; a unix socket works and leaks nothing."""
    project.add("unit/test_leaks.py", LEAKS)
    output = project.run("-k", "socket or clean").stdout

    assert "FAILED tests/unit/test_leaks.py::test_socket" in output
    assert "PASSED tests/unit/test_leaks.py::test_unix_socket" in output
    assert "ERROR" not in output


def test_integration_reaches_loopback_only(project: Project) -> None:
    """In the slower folders loopback is open, the world is shut, and orphans are found."""
    project.add("integration/test_reach.py", DETACHED)
    output = project.run().stdout

    assert "PASSED tests/integration/test_reach.py::test_loopback" in output
    assert "FAILED tests/integration/test_reach.py::test_elsewhere" in output
    assert "ERROR tests/integration/test_reach.py::test_detached_process" in output
    assert "sleep 61" in output


@pytest.mark.parametrize(("ci", "status"), [("true", 1), ("", 0)])
def test_a_test_that_needs_root_is_not_left_out_in_silence(
    project: Project, ci: str, status: int
) -> None:
    """Without root such a test is listed as NOT RUN; in CI that fails the run."""
    project.add("integration/test_root.py", ROOT_ONLY)
    finished = project.run(ci=ci)

    assert status == finished.returncode, finished.stdout
    assert "= NOT RUN =" in finished.stdout
    assert "tests/integration/test_root.py::test_mount: NOT RUN: needs root" in finished.stdout


def test_stages_run_in_order(project: Project) -> None:
    """Whatever the seed, real engines come last and one-process tests first."""
    for folder in ("e2e", "fault", "unit"):
        project.add(f"{folder}/test_one.py", "def test_it():\n    assert True\n")
    output = project.run("-v").stdout

    order = [
        output.index(f"tests/{folder}/test_one.py::test_it PASSED")
        for folder in ("unit", "fault", "e2e")
    ]
    assert sorted(order) == order


def test_what_a_command_deselects_is_listed(project: Project) -> None:
    """Tests left out by -m are counted per file in the summary."""
    project.add("e2e/test_one.py", "def test_it():\n    assert True\n")
    project.add("unit/test_one.py", "def test_it():\n    assert True\n")
    output = project.run("-m", "not engine").stdout

    assert "tests/e2e/test_one.py: 1 deselected by this command" in output


def test_processes_keep_their_bytecode(tmp_path: Path) -> None:
    """What a test starts reads its modules from sources once, whatever the environment asks for."""
    (tmp_path / "kept.py").touch()
    subprocess.run([sys.executable, "-c", "import kept"], cwd=tmp_path, check=True)

    assert [path.name.split(".")[0] for path in tmp_path.rglob("*.pyc")] == ["kept"]
