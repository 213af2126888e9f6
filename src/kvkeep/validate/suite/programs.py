"""Programs that suites run: in a child process that ends with the suite, its output kept.

Between the two is a reaper, so that nothing of a program outlives a check that was killed.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvkeep.stack.process import REAPER_SPARE_S, reaper_command
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
    mine, theirs = socket.socketpair()
    with mine:
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *reaper_command(theirs.fileno(), STOP_GRACE_S, command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(timeout_s):
                said, _ = await process.communicate()
        except TimeoutError:
            return Ran(124, [f"{command[0]} was ended after {timeout_s:.0f} s"])
        finally:
            await _end(process)
        lines = [*said.decode("utf-8", "replace").splitlines(), *_why_not_started(mine)]
    return Ran(process.returncode or 0, lines)


def _why_not_started(channel: socket.socket) -> list[str]:
    """What the reaper said instead of a pid, once it has ended; nothing if the program ran."""
    with channel.makefile("rb") as told:
        line = told.readline()
    said = json.loads(line) if line else {"error": "its reaper ended at once"}
    return [said["error"]] if "error" in said else []


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a program and all that it started: its reaper does it, and has the time for it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_GRACE_S + REAPER_SPARE_S)
