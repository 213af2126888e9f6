"""Programs that suites run: their output is kept, and none outlives its suite."""

import asyncio
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.suite.programs import is_installed, python_of, run_program

PARENT = """
import os, subprocess, sys, time
note, sleeper = sys.argv[1:]
subprocess.Popen([sys.executable, "-c", sleeper, note], start_new_session=True)
while not (os.path.exists(note) and os.path.getsize(note)):
    time.sleep(0.01)
"""
SLEEPER = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"


async def test_output_and_code_are_kept() -> None:
    """Both streams, and the exit code."""
    text = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"

    ran = await run_program([sys.executable, "-c", text], timeout_s=60.0)

    assert (ran.code, sorted(ran.lines), ran.last_words) == (3, ["err", "out"], ran.lines[-1])


async def test_a_missing_program_is_a_result() -> None:
    """It can't be started: a code and a sentence, no exception."""
    ran = await run_program(["/no/such/program"], timeout_s=60.0)

    assert ran.code == 127
    assert "can't be started" in ran.last_words


async def test_a_suite_that_is_broken_off_ends_its_program(tmp_path: Path) -> None:
    """Cancelled in the middle, it leaves no process behind."""
    note = tmp_path / "pid"
    os.mkfifo(note)
    command = [sys.executable, "-c", SLEEPER, str(note)]
    task = asyncio.create_task(run_program(command, timeout_s=600.0))
    pid = int(await asyncio.to_thread(note.read_text))

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_what_a_program_left_behind_ends_with_it(tmp_path: Path) -> None:
    """Its own child ends too, though it went into a session of its own."""
    note = tmp_path / "pid"
    command = [sys.executable, "-c", PARENT, str(note), SLEEPER]

    ran = await run_program(command, timeout_s=60.0)

    assert ran.code == 0, ran.lines
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_a_killed_check_leaves_no_program(tmp_path: Path) -> None:
    """Nobody can end it then but its reaper."""
    note = tmp_path / "pid"
    os.mkfifo(note)
    program = [sys.executable, "-c", SLEEPER, str(note)]
    run = f"run_program({program!r}, timeout_s=600.0)"
    text = f"import asyncio\nfrom {run_program.__module__} import run_program\nasyncio.run({run})"
    with subprocess.Popen([sys.executable, "-c", text]) as check:
        sleeper = os.pidfd_open(int(note.read_text()))
        check.kill()

    select.select([sleeper], [], [])  # until it has ended; the test's time limit is the only one
    os.close(sleeper)


def environment_of(folder: Path, *packages: str, takes_more: bool = False) -> CheckSettings:
    """A Python environment that has some packages."""
    for name in packages or ("pip",):
        (folder / "lib/python3.11/site-packages" / name).mkdir(parents=True)
    said = f"include-system-site-packages = {str(takes_more).lower()}\n"
    (folder / "pyvenv.cfg").write_text(said)
    return CheckSettings(venv_dir=str(folder))


def test_the_environment_is_named(tmp_path: Path) -> None:
    """VENV_DIR's interpreter, or this one, also where only this one has the program."""
    named = environment_of(tmp_path, "lm_eval")

    assert python_of(named, "lm_eval") == str(tmp_path / "bin/python")
    assert python_of(named, "pytest") == sys.executable
    assert python_of(named, "no_such_program") == str(tmp_path / "bin/python")
    assert python_of(CheckSettings(), "lm_eval") == sys.executable


def test_what_is_installed_is_found_without_running_anything(tmp_path: Path) -> None:
    """In the environment that was named, or here; one with its host's packages may have it."""
    lean = environment_of(tmp_path / "lean", "lm_eval", "__editable__.some_tool-1.0.pth")
    rich = environment_of(tmp_path / "rich", takes_more=True)

    assert [is_installed(lean, name) for name in ("lm_eval", "some_tool", "pytest", "no_such")] == [
        *[True] * 3,
        False,
    ]
    assert is_installed(rich, "no_such")
    assert is_installed(CheckSettings(venv_dir=str(tmp_path / "gone")), "no_such")
    assert not is_installed(CheckSettings(), "no_such")
