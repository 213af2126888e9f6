"""What is made of a failed process's output."""

import os
import sys
from pathlib import Path

import pytest

from kvkeep.stack.process import ProcessId, StackProcess, telling_line, this_process
from kvkeep.stack.record import wait_for_end

VLLM = """\
(APIServer pid=1) INFO 11-21 05:04:11 [api.py:1] starting
(EngineCore pid=2) ERROR 11-21 [core.py:1] EngineCore failed to start.
(EngineCore pid=2) ERROR 11-21 [core.py:1] Traceback (most recent call last):
(EngineCore pid=2) ERROR 11-21 [core.py:1] ValueError: Available memory is less than requested.
(APIServer pid=1) Traceback (most recent call last):
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.
"""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (VLLM, "ValueError: Available memory is less than requested."),
        ("a\nkvkeep.model.errors.InputError: no port\n", "kvkeep.model.errors.InputError: no port"),
        ("WARNING this can cause `OSError: Too many open files`\nINFO loading\n", "INFO loading"),
        ("starting\nkilled\n\n", "killed"),
        ("RuntimeError: Engine core initialization failed. x\nbye\n", "bye"),
        ("", "it wrote nothing"),
        ("x" * 1000, "x" * 400),
    ],
)
def test_the_telling_line_names_the_cause(text: str, line: str) -> None:
    """The first error that names a cause is what a person is told."""
    assert telling_line(text) == line


def test_a_pid_given_out_again_is_another_process() -> None:
    """A process is told from a later one by when it began."""
    me = this_process()

    assert me.is_alive()
    assert not ProcessId(me.pid, me.start_ticks + 1).is_alive()


def test_what_a_process_makes_is_its_users_alone(tmp_path: Path) -> None:
    """Whatever the umask of whoever started the stack is."""
    process = StackProcess("maker", tmp_path / "log")
    before = os.umask(0o000)
    try:
        make = "import os, socket; socket.socket(socket.AF_UNIX).bind('s'); os.mkdir('d')"
        started = process.start(
            [sys.executable, "-c", make], environment=dict(os.environ), folder=tmp_path
        )
        assert wait_for_end(started, 60.0)
    finally:
        os.umask(before)
        process.stop()

    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("s", "d")]
    assert modes == [0o700, 0o700]
