"""Programs that suites run: in a child process that ends with the suite, its output kept."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvkeep.validate.settings import CheckSettings

STOP_GRACE_S = 10.0


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of a program."""

    code: int
    lines: list[str]
    """What it wrote, both streams together."""

    @property
    def last_words(self) -> str:
        """Its last line that says something."""
        said = [line.strip() for line in self.lines if line.strip()]
        return said[-1] if said else "it said nothing"


def python_of(settings: CheckSettings) -> str:
    """The interpreter of the environment whose programs are run."""
    if settings.venv_dir is None:
        return sys.executable
    return str(Path(settings.venv_dir).expanduser() / "bin" / "python")


async def run_program(
    command: Sequence[str], *, timeout_s: float, environment: Mapping[str, str] | None = None
) -> Ran:
    """Run a program to its end, or end it: when its time is up, and when the suite is broken off.

    Args:
        command: Program and arguments.
        timeout_s: Longest it may take.
        environment: Variables beside those of this process.

    Returns:
        What it did; code 124 if its time was up, 127 if it can't be started.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    except OSError as error:
        return Ran(127, [f"{command[0]} can't be started: {error.strerror}"])
    try:
        async with asyncio.timeout(timeout_s):
            said, _ = await process.communicate()
    except TimeoutError:
        return Ran(124, [f"{command[0]} was ended after {timeout_s:.0f} s"])
    finally:
        await _end(process)
    return Ran(process.returncode or 0, said.decode("utf-8", "replace").splitlines())


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a program and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_GRACE_S)
