"""Stacks that lose a daemon, their state folder or their supervisor; files that are not theirs."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from kvkeep.model.errors import UnavailableError
from kvkeep.stack.process import ProcessId, StackProcess, this_process
from kvkeep.stack.programs.reaper import start_ticks
from kvkeep.stack.record import (
    ProcessRecord,
    StackRecord,
    bring_down,
    read_record,
    write_record,
)
from kvkeep.stack.spec import StackSpec
from kvkeep.stack.supervisor import Stack
from tests.integration.test_stack import BROKEN_ENGINE, fake_stack, kvkeep, running, spec_of
from tests.waiting import HANG_S

# A program whose child, in the same session, holds the shared memory that the program made.
SHARER = """
import subprocess, sys, time
from multiprocessing.shared_memory import SharedMemory
memory = SharedMemory(create=True, size=4096)
from multiprocessing import resource_tracker
fd = resource_tracker._resource_tracker._fd
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=[fd])
print(memory.name, child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def spec(tmp_path: Path, model: Path) -> StackSpec:
    return spec_of(tmp_path, model, {})


def outside_file(tmp_path: Path, model: Path, *, daemon: str = "pool_bytes: 16MiB") -> Path:
    """A stack file of one engine that runs already, at an address where nobody answers."""
    file = tmp_path / "s.yaml"
    file.write_text(
        f"model: {model}\nstate_dir: {tmp_path}/state\ndaemon: {{{daemon}}}\n"
        "start_timeout_s: 90\nengines: [{name: a, url: 'http://127.0.0.1:9'}]\n"
    )
    return file


# --- Files that are not the stack's ------------------------------------------------------------


@pytest.mark.parametrize("field", ["daemon.settings.pool", "daemon.socket"])
def test_a_file_of_the_user_s_survives_a_refused_start(
    tmp_path: Path, model: Path, field: str
) -> None:
    """A path that holds something else is refused with exit code 2, and left as it was."""
    precious = tmp_path / "precious"
    precious.write_text("precious")

    up = kvkeep("up", str(outside_file(tmp_path, model)), "--quiet", "--set", f"{field}={precious}")
    down = kvkeep("down", str(tmp_path / "s.yaml"))

    assert up.returncode == 2
    assert f"{precious} exists and is not a" in up.stderr
    assert down.returncode == 0
    assert precious.read_text() == "precious"


@pytest.fixture
def left_pool(tmp_path: Path, model: Path) -> Path:
    """The pool of a daemon that was stopped, at a path of the user's choice."""
    pool = tmp_path / "left.pool"
    daemon = {"pool_bytes": "16MiB", "keep_pool": True, "settings": {"pool": str(pool)}}
    with fake_stack(spec_of(tmp_path / "earlier", model, {"daemon": daemon})):
        pass
    return pool


def test_a_pool_that_another_daemon_left_is_not_removed(
    tmp_path: Path, model: Path, left_pool: Path
) -> None:
    """Neither a start that fails nor a stop takes a pool that lay there before."""
    daemon = {"pool_bytes": "16MiB", "settings": {"pool": str(left_pool)}}
    spec = spec_of(tmp_path, model, {"daemon": daemon})
    broken = Stack(spec, launcher=running(BROKEN_ENGINE))
    with pytest.raises(UnavailableError, match="this machine has no such thing"):
        broken.start()
    with fake_stack(spec) as stack:
        assert stack.daemon.pool == str(left_pool)

    assert left_pool.stat().st_size == 16 << 20


def test_a_pool_of_the_user_s_choice_goes_with_its_stack(tmp_path: Path, model: Path) -> None:
    """A pool that the stack's daemon made itself leaves with the stack, wherever it lies."""
    pool = tmp_path / "own.pool"
    daemon = {"pool_bytes": "16MiB", "settings": {"pool": str(pool)}}
    with fake_stack(spec_of(tmp_path, model, {"daemon": daemon})):
        assert pool.exists()

    assert not pool.exists()


# --- A daemon that does not come back ----------------------------------------------------------


@pytest.mark.fault
def test_a_restarted_daemon_takes_another_port_if_its_own_is_taken(spec: StackSpec) -> None:
    """A free port that was only lent is not insisted on."""
    with fake_stack(spec) as stack:
        before = stack.daemon.metrics_url
        stack.daemon.kill()
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", int(before.rpartition(":")[2])))
            other.listen()
            stack.daemon.restart()
            health = httpx.get(
                f"{stack.daemon.metrics_url}/health", trust_env=False, timeout=HANG_S
            )
        record = read_record(stack.folder)

        assert health.status_code == 200
        assert stack.daemon.metrics_url != before
        assert record is not None
        assert record.daemon is not None
        assert record.daemon.metrics_url == stack.daemon.metrics_url


@pytest.mark.fault
def test_a_restart_that_fails_leaves_no_daemon(spec: StackSpec) -> None:
    """A daemon that refuses its pool is one error, and nothing half-started runs on."""
    with fake_stack(spec) as stack:
        stack.daemon.kill()
        pool = Path(stack.daemon.pool)
        pool.unlink()
        pool.write_text("precious")
        with pytest.raises(UnavailableError, match="exists and is not a pool"):
            stack.daemon.restart()

        assert not stack.daemon.process.is_running()
        assert stack.daemon.process.reaper_id is None
        assert [part.name for part in stack.ended()] == ["daemon"]
    assert pool.read_text() == "precious"
    pool.unlink()


@pytest.fixture
def outside(tmp_path: Path, model: Path) -> Iterator[Stack]:
    """An engine that runs already."""
    values = {
        "daemon": {"enabled": False},
        "engines": [{"name": "x", "connector": "none", "kv_cache_bytes": "1MiB"}],
    }
    with fake_stack(spec_of(tmp_path / "outside", model, values)) as stack:
        yield stack


@pytest.mark.fault
def test_engines_go_on_without_a_daemon_that_can_t_start(
    tmp_path: Path, model: Path, outside: Stack
) -> None:
    """Three restarts fail, that is said once, and the stack stays up until it is stopped."""
    file = outside_file(tmp_path, model)
    file.write_text(file.read_text().replace("http://127.0.0.1:9", outside.engines["x"].url))
    command = [sys.executable, "-m", "kvkeep", "up", str(file), "--json", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        assert up.stderr is not None
        up.stdout.readline()
        record = read_record(tmp_path / "state")
        assert record is not None
        assert record.daemon is not None
        pool = Path(record.daemon.pool)
        os.kill(record.processes[0].process.pid, signal.SIGKILL)
        pool.unlink()
        pool.write_text("precious")
        said = [up.stderr.readline()]
        while "stays down" not in said[-1]:
            assert said[-1], "".join(said)
            said.append(up.stderr.readline())
        is_up = up.poll() is None
        state = kvkeep("wait", str(file), "--json", "--quiet")
        up.send_signal(signal.SIGTERM)

    assert (is_up, state.returncode, up.returncode) == (True, 0, 0)
    assert sum("is restarted" in line for line in said) == 3
    assert "exists and is not a pool" in said[-1]
    assert pool.read_text() == "precious"
    pool.unlink()


# --- A supervisor that loses its folder, or is lost --------------------------------------------


@pytest.mark.fault
def test_a_stack_without_its_state_folder_is_stopped_all_the_same(spec: StackSpec) -> None:
    """What was written down is gone; every process and the pool go when the stack is stopped."""
    with fake_stack(spec) as stack:
        pool = Path(stack.daemon.pool)
        record = stack.record()
        shutil.rmtree(stack.folder)

    assert not pool.exists()
    assert len(record.processes) == 3
    assert not any(entry.process.is_alive() for entry in record.processes)


@pytest.mark.fault
def test_a_daemon_is_restarted_without_the_state_folder(spec: StackSpec) -> None:
    """The folder is made again for what the daemon reads and writes there."""
    with fake_stack(spec) as stack:
        shutil.rmtree(stack.folder)
        stack.daemon.kill()
        stack.daemon.restart()

        assert stack.ended() == []


def start_sharer(folder: Path) -> tuple[StackProcess, Path, ProcessId]:
    """Start `SHARER`; its shared memory, and its child."""
    process = StackProcess("engine a", folder / "logs" / "a.log")
    process.start([sys.executable, "-c", SHARER], environment=os.environ, folder=folder)
    while not (words := process.new_output().split()):
        time.sleep(0.02)
    child = int(words[1])
    return process, Path("/dev/shm") / words[0].decode(), ProcessId(child, start_ticks(child) or 0)


@pytest.mark.fault
def test_a_killed_process_leaves_no_shared_memory(tmp_path: Path) -> None:
    """Its resource tracker is given the time to remove what the killed one can't."""
    process, memory, child = start_sharer(tmp_path)
    assert memory.exists()

    process.kill()

    assert not child.is_alive()
    assert not memory.exists()


@pytest.mark.fault
def test_down_names_what_lived_on_without_its_reaper(tmp_path: Path) -> None:
    """With supervisor, reaper and engine killed, the engine's child is ended, named and tidied."""
    process, memory, child = start_sharer(tmp_path)
    reaper, engine = process.reaper_id, process.id
    assert reaper is not None
    assert engine is not None
    entry = ProcessRecord(name="engine a", process=engine, reaper=reaper, log="")
    gone = ProcessId(this_process().pid, 1)
    write_record(
        tmp_path,
        StackRecord(name="s", state="ready", supervisor=gone, model="m", processes=[entry]),
    )
    for killed in (reaper, engine):
        if killed.is_alive():
            os.kill(killed.pid, signal.SIGKILL)
        while killed.is_alive():
            time.sleep(0.02)
    lived_on = child.is_alive()

    stopped = bring_down(tmp_path)

    assert (lived_on, child.is_alive()) == (True, False)
    assert stopped == ["engine a"]
    assert not memory.exists()
    process.stop()
