"""``kvkeep cartridge train``: what is made, what is shown, and what is refused."""

import importlib
import os
import signal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from kvkeep.authoring.training.distill import lessons_of_step
from tests.unit.authoring.tiny import TEXT, one_thread
from tests.unit.cli.makers import model, run, text, told

__all__ = ["model", "one_thread", "text"]
SMALL = [
    *("--tokens", 12, "--steps", 4, "--conversations", 16, "--conversations-per-step", 2),
    *("--answer-tokens", 4),
]


def test_a_text_is_trained_and_registered(tmp_path: Path, text: Path, model: str) -> None:
    """With its losses for machines, and a plot that needs nothing but itself."""
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "Who?", "answer": "Ada Finch."}\n')
    work = tmp_path / "work"
    options = ("--model", model, "--id", "mill", "--device", "cpu", "--work", work)
    result = run(tmp_path, "train", text, *options, *SMALL, "--questions", questions, "--json")
    found = told(result)
    training, manifest = found["training"], found["manifest"]

    assert (manifest["method"], manifest["num_training_steps"]) == ("trained", 4)
    assert (manifest["num_tokens"], manifest["num_frozen_tokens"]) == (12, 1)
    assert training["num_document_tokens"] == len(TEXT)
    assert set(training["questions"]) == {"nothing", "beginning", "cartridge", "text"}
    root = ElementTree.fromstring((work / "loss.svg").read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(list(root.iter("{http://www.w3.org/2000/svg}polyline"))) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_and_the_same_command_goes_on(
    tmp_path: Path, text: Path, model: str, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Exit code 130, nothing registered, no step done twice, and the signal's handler as before."""
    options = ("--model", model, "--id", "mill", "--device", "cpu", "--work", tmp_path / "w")
    before = signal.getsignal(number)

    def signalled(*args: Any) -> Any:
        if args[2] == 1:
            os.kill(os.getpid(), number)
        return lessons_of_step(*args)

    # Not by its path: a test of what is imported may have made its package anew.
    training = importlib.import_module("kvkeep.authoring.training.train")
    with monkeypatch.context() as patched:
        patched.setattr(training, "lessons_of_step", signalled)
        stopped = run(tmp_path, "train", text, *options, *SMALL)
    assert (stopped.exit_code, stopped.stdout) == (130, "")
    assert f"stopped; the same command goes on from {tmp_path / 'w'}" in stopped.stderr
    assert not (tmp_path / "library").exists()
    assert signal.getsignal(number) is before
    gone_on = run(tmp_path, "train", text, *options, *SMALL)
    assert "step 0" not in gone_on.stderr
    assert gone_on.stdout.startswith("trained mill: 12 tokens")


def test_a_person_sees_the_losses(tmp_path: Path, text: Path, model: str) -> None:
    """Of every way to answer, in words."""
    options = ("--model", model, "--id", "mill", "--device", "cpu", "--work", tmp_path / "w")
    lines = run(tmp_path, "train", text, *options, *SMALL).stdout.splitlines()

    assert lines[0] == "trained mill: 12 tokens"
    assert lines[1].startswith(f"12 tokens in place of {len(TEXT)} (13.8 times fewer), 4 steps")
    assert lines[2].startswith("loss of answers that the model made up, in nats per token: without")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--id", "a b"), "'a b' can't be an id"),
        (("--model", "/gone/model"), "there is no such folder"),
        (("--tokens", 1), "--tokens: Expected `int` >= 2"),
        (("--learning-rate", 0), "--learning-rate: Expected `float` > 0"),
        (("--questions", "/gone/q"), "/gone/q can't be read"),
    ],
)
def test_bad_settings_are_one_sentence(
    tmp_path: Path, text: Path, model: str, options: tuple[str, object], sentence: str
) -> None:
    """Named by their option."""
    result = run(tmp_path, "train", text, "--model", model, "--id", "mill", *SMALL, *options)

    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr


@pytest.mark.parametrize("line", ["[]", '{"question": "Who?"}', ""])
def test_questions_of_another_form_are_refused(
    tmp_path: Path, text: Path, model: str, line: str
) -> None:
    """In a sentence that names the file."""
    questions = tmp_path / "q.jsonl"
    questions.write_text(line)
    options = ("--model", model, "--id", "mill", "--questions", questions)
    result = run(tmp_path, "train", text, *options, *SMALL)

    assert result.exit_code == 2
    assert f"{questions} has" in result.stderr
