"""What ranks of an engine leave in shared memory when they are killed goes with the engine."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE

import pytest

from kvkeep.stack.process import StackProcess
from kvkeep.stack.programs.reaper import RankFiles, is_rank_file, start_ticks
from tests.integration.daemons import wait_until

SHARED_MEMORY = Path("/dev/shm")

# Makes a file in shared memory as a rank does, and waits to be killed.
RANK = """
import mmap, os, signal, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
os.ftruncate(file, 4096)
memory = mmap.mmap(file, 4096)
print(os.getpid(), flush=True)
signal.pause()
"""
# Starts such a rank, and outlives it.
ENGINE = f"""
import signal, subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", {RANK!r}, sys.argv[1]])
signal.pause()
"""


@pytest.fixture
def file() -> Iterator[Path]:
    """A name as vLLM draws them."""
    found = SHARED_MEMORY / f"vllm_dist_{os.getpid():032}-tp:0-[0-1]-cpushm_1"
    yield found
    found.unlink(missing_ok=True)


def start(program: str, file: Path, folder: Path) -> tuple[StackProcess, int]:
    """A stack's process that is or has a rank, and the rank's pid; once its file is there."""
    process = StackProcess("engine a", folder / "log")
    command = [sys.executable, "-c", program, str(file)]
    process.start(command, environment=os.environ, folder=folder)
    wait_until(lambda: process.new_output().endswith(b"\n"), "the rank has its file", 60.0)
    return process, int(process.new_output())


def num_waits(pid: int) -> int:
    """How often a process of one thread has gone to sleep."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


@pytest.mark.fault
@pytest.mark.parametrize(
    ("program", "end"),
    [(RANK, StackProcess.stop), (ENGINE, StackProcess.stop), (ENGINE, StackProcess.kill)],
    ids=["stopped", "stopped-above", "killed-above"],
)
def test_what_ranks_leave_goes_with_their_engine(
    tmp_path: Path, file: Path, program: str, end: Callable[[StackProcess], None]
) -> None:
    """Whether the engine is stopped, or its first process killed."""
    process, _ = start(program, file, tmp_path)
    assert file.exists()

    end(process)

    assert process.is_gone()
    assert not file.exists()


@pytest.mark.fault
def test_a_rank_that_died_long_before_its_engine_leaves_nothing_either(
    tmp_path: Path, file: Path
) -> None:
    """The reaper looks while all is well, for afterwards nobody could tell whose file it was."""
    process, rank = start(ENGINE, file, tmp_path)
    reaper = process.reaper_id
    assert reaper is not None
    seen = num_waits(reaper.pid)

    def has_looked() -> bool:
        os.kill(reaper.pid, signal.SIGCHLD)  # or it would sleep for a second each time
        return num_waits(reaper.pid) > seen + 2

    wait_until(has_looked, "the reaper went round", 60.0)
    os.kill(rank, signal.SIGKILL)
    wait_until(lambda: start_ticks(rank) is None, "the rank is dead", 60.0)
    process.stop()

    assert not file.exists()


def test_files_of_others_stay(file: Path) -> None:
    """What no descendant has mapped, and what took the name of a file that one had."""
    other = file.with_name(file.name.replace("vllm_dist_", "vllm_dist_f"))
    other.touch()
    files = RankFiles()
    try:
        with subprocess.Popen([sys.executable, "-c", RANK, str(file)], stdout=PIPE) as rank:
            assert rank.stdout is not None
            rank.stdout.readline()
            files.look()
            rank.kill()
        file.rename(before := file.with_name(f"{file.name}.before"))
        file.touch()
        files.remove()

        assert (other.exists(), file.exists()) == (True, True)
        file.unlink()
        before.rename(file)
        files.remove()
        assert (other.exists(), file.exists()) == (True, False)
    finally:
        other.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("vllm_dist_0a1b-tp:0-[0-1]-cpushm_0", True),
        ("41233-pp:0-[0-2]-cpushm_12", True),
        ("vllm_dist_0a1b-tp:0-[0-1]-cpushm_", False),
        ("vllm_dist_0a1b-tp:0-[0-1]-cpushm_0.old", False),
        ("psm_4c1f_0", False),
        ("kvkeep-12-abc.pool", False),
    ],
)
def test_only_files_of_ranks_are_looked_at(name: str, is_one: bool) -> None:
    """Told by their names, as vLLM makes them."""
    assert is_rank_file(name) is is_one
