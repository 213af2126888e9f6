"""``kvkeep check`` in a process of its own; the stack that it starts has fake engines.

Everything that it makes lies in folders of the test's, and everything that it starts carries a mark
in its environment, so that what is left of it can be found. Run as a program it is ``kvkeep
check``.
"""

import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvkeep.cli.check import check
from kvkeep.stack.engines import Launch, Placement
from kvkeep.stack.precedence import load_spec
from kvkeep.stack.record import read_record
from kvkeep.stack.spec import EngineSpec
from kvkeep.stack.supervisor import Stack
from kvkeep.validate import started
from kvkeep.validate.suite.base import GROUPS

ROOT = Path(__file__).parent.parent.parent
MARK = "TEST_MARK_OF_CHECK"
"""Not KVKEEP_...: those names are settings."""
STACK = """\
name: checked
model: {folder}/model
served_model_name: fake-model
state_dir: {folder}/state
start_timeout_s: 90
daemon: {{pool_bytes: 64MiB}}
engines: [{{name: a}}, {{name: b}}]
"""
SHORT = ("--max-iterations", "2", "--max-tokens", "4", "--ifeval-prompts", "5")
"""For groups; a suite by itself takes fewer options."""


def launch(_engine: EngineSpec, placement: Placement) -> Launch:
    """A fake engine instead of a real one."""
    command = [sys.executable, "-m", "kvkeep.testing.fake_engine", "--port", str(placement.port)]
    return Launch(command=command, environment=dict(os.environ))


class CheckedStack:
    """Folders of a check that is run, and what is left of it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kvkeep-test-"))
        self.report = self.folder / "reports" / "report.json"
        self._mark = secrets.token_hex(8)
        for name in ("model", "tmp", "run"):
            (self.folder / name).mkdir(mode=0o700)
        (self.folder / "model" / "config.json").write_text("{}")
        self._file = self.folder / "stack.yaml"
        self._file.write_text(STACK.format(folder=self.folder))
        self._pool = load_spec(self._file).daemon_settings().pool_path

    def begin(self, what: str) -> "subprocess.Popen[str]":
        """Start ``kvkeep check``; what it says comes line by line."""
        short = SHORT if what in GROUPS else ()
        command = [sys.executable, "-m", "tests.integration.checked_stacks", what, *short]
        command += ["--stack", str(self._file), "--json", str(self.report)]
        own = {
            MARK: self._mark,
            "TMPDIR": str(self.folder / "tmp"),
            "XDG_RUNTIME_DIR": str(self.folder / "run"),
            "XDG_STATE_HOME": str(self.folder / "home"),
            "PYTHONUNBUFFERED": "1",
        }
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def processes(self) -> list[int]:
        """Pids of everything that came of it and runs."""
        wanted, found = f"{MARK}={self._mark}".encode(), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if wanted in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def leftovers(self) -> list[str]:
        """What should not be there when no check runs."""
        found = [f"process {pid}" for pid in self.processes()]
        found += [str(self._pool)] * self._pool.exists()
        for name in ("tmp", "run"):
            found += [str(path) for path in (self.folder / name).rglob("*") if not path.is_dir()]
        found += [str(path) for path in self.folder.rglob("*.sock")]
        found += [str(path) for path in self.folder.rglob("*.part*")]
        record = read_record(self.folder / "state")
        # A start that came to nothing leaves word why, and nothing else.
        if record is not None and (record.state != "failed" or record.processes):
            found.append(f"a record of a stack that is {record.state}")
        return found

    def runs(self) -> list[dict[str, Any]]:
        """What the report has, which is whole at any moment."""
        if not self.report.exists():
            return []
        found: list[dict[str, Any]] = json.loads(self.report.read_text())["runs"]
        return found


@contextlib.contextmanager
def checked_stack() -> Iterator[CheckedStack]:
    """Folders for one check; what a broken one leaves is removed."""
    stack = CheckedStack()
    try:
        yield stack
    finally:
        for pid in stack.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        stack._pool.unlink(missing_ok=True)
        shutil.rmtree(stack.folder, ignore_errors=True)


if __name__ == "__main__":
    vars(started)["Stack"] = functools.partial(Stack, launcher=launch)
    check()
