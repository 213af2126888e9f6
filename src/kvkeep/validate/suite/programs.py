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
from importlib.util import find_spec
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


def python_of(settings: CheckSettings, package: str) -> str:
    """The interpreter of the environment whose program is run.

    Args:
        settings: Name an environment, or leave it to this one.
        package: What the program is. Of an environment that was named for another program, and
            lacks it, this one takes the place where it has it.
    """
    named = settings.venv_dir
    if named is None or (lacks(Path(named), package) and find_spec(package) is not None):
        return sys.executable
    return str(Path(named).expanduser() / "bin" / "python")


def is_installed(settings: CheckSettings, package: str) -> bool:
    """Whether the environment that was named has a package, or this one has."""
    named = settings.venv_dir
    if named is not None and not lacks(Path(named), package):
        return True
    return find_spec(package) is not None


def lacks(environment: Path, package: str) -> bool:
    """Whether a Python environment surely lacks a package; nothing in it is run.

    One that also takes what its host has, or whose packages can't be found, may have it.
    """
    environment = environment.expanduser()
    places = list(environment.glob("lib*/python*/site-packages"))
    try:
        takes_more = "include-system-site-packages = true" in (
            (environment / "pyvenv.cfg").read_text("utf-8").lower()
        )
    except OSError:
        takes_more = True
    # What is installed for editing has only a finder there, under a name made of the package's.
    there = (place.glob(name) for place in places for name in (package, f"__editable__*{package}*"))
    return bool(places) and not takes_more and not any(True for found in there for _ in found)


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
