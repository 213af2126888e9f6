"""Programs that suites run: their output is kept, and none outlives its suite."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.suite.programs import python_of, run_program

SLEEPER = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"


async def test_output_and_code_are_kept() -> None:
    """Both streams, and the exit code."""
    text = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"

    ran = await run_program([sys.executable, "-c", text], timeout_s=30.0)

    assert (ran.code, sorted(ran.lines), ran.last_words) == (3, ["err", "out"], ran.lines[-1])


async def test_a_missing_program_is_a_result() -> None:
    """It can't be started: a code and a sentence, no exception."""
    ran = await run_program(["/no/such/program"], timeout_s=1.0)

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


def test_the_environment_is_named() -> None:
    """VENV_DIR's interpreter, or this one."""
    assert python_of(CheckSettings(venv_dir="/tmp/v")) == "/tmp/v/bin/python"
    assert python_of(CheckSettings()) == sys.executable
