"""What a person sees where there is no terminal."""

import io

import pytest
from rich.console import Console

from kvkeep.stack.progress import Progress


class StoppedClock:
    def now_s(self) -> float:
        return 5.0


def test_lines_are_printed_once_each(capsys: pytest.CaptureFixture[str]) -> None:
    """Away from a terminal every change is one line on stderr."""
    with Progress(clock=StoppedClock()).task("model m", steps=2) as task:
        changed = [task.say("reading"), task.say("reading"), task.say("writing", steps_done=1)]

    assert changed == [True, False, True]
    assert capsys.readouterr() == (
        "",
        "model m: reading\nmodel m: writing\nmodel m: done in 0.0 s\n",
    )


def test_a_quiet_one_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """A caller that wants silence gets it."""
    with Progress(quiet=True).task("model m") as task:
        task.say("reading")

    assert capsys.readouterr() == ("", "")


def test_a_task_that_fails_is_not_done(capsys: pytest.CaptureFixture[str]) -> None:
    """An error is not shown as success, and goes on to the caller."""

    def fail() -> None:
        with Progress(clock=StoppedClock()).task("model m") as task:
            task.say("reading")
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert capsys.readouterr().err == "model m: reading\nmodel m: stopped\n"


def test_what_never_began_is_not_said_to_stop(capsys: pytest.CaptureFixture[str]) -> None:
    """Waiting for what is not there is an error, and no more than that."""

    def fail() -> None:
        with Progress(clock=StoppedClock()).task("stack s"):
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_bars() -> None:
    """On a terminal the tasks are drawn with what they do."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100)
    with Progress(console=console) as progress, progress.task("model m", steps=2) as task:
        task.say("reading", steps_done=1)
        task.finish("ready")
        task.finish("done")

    assert "model m" in output.getvalue()
    assert "ready" in output.getvalue()
    assert "done" not in output.getvalue()
