"""``kvkeep cartridge train``: a cartridge with fewer tokens than its document."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec

from kvkeep.cli.cartridge_making import Description, authoring, computing, describing
from kvkeep.cli.cartridge_plot import write_plot
from kvkeep.model.errors import InputError
from kvkeep.stack.models import check_model
from kvkeep.stack.progress import Progress

EXIT_STOPPED = 130
_NUMBERS = {
    "tokens": ("num_tokens", int, "Tokens of the cartridge."),
    "steps": ("num_steps", int, "Steps of training."),
    "conversations": ("num_conversations", int, "Conversations that the model makes up."),
    "conversations-per-step": ("num_per_step", int, "Of these, in one step."),
    "answer-tokens": ("answer_tokens_max", int, "At most, in an answer that it makes up."),
    "frozen-tokens": ("num_frozen_tokens", int, "Leading tokens that stay as they are."),
    "learning-rate": ("learning_rate", float, "Of Adam, at its highest."),
    "seed": ("seed", int, "Of everything that is drawn."),
}
_Command = Callable[..., None]


class _Question(msgspec.Struct):
    question: str
    answer: str


def _settings(command: _Command) -> _Command:
    for option, (name, kind, text) in reversed(_NUMBERS.items()):
        needed = name == "num_tokens"
        command = click.option(f"--{option}", name, type=kind, required=needed, help=text)(command)
    return command


@click.command()
@click.argument("text_path", metavar="TEXT", type=click.Path(path_type=Path))
@computing
@_settings
@click.option(
    "--questions",
    "questions_path",
    type=click.Path(path_type=Path),
    help="Questions to judge it by, never trained on: lines of {question, answer} in JSON.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Folder to go on from after a stop; by default ID.training.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="SVG of the losses; else in --work.")
@describing
def train(text_path: Path, model: str, **told: Any) -> None:
    """Train a cartridge for the text in the file TEXT, and register it.

    The model reads the whole text, makes up conversations about it, and a short prefix
    learns to make it expect the same. The same command goes on after Ctrl-C or SIGTERM.
    """
    described = Description.of(told, text_path.name)
    settings = _checked_settings(told)
    check_model(model)
    text = authoring("texts").read_text(text_path)
    questions = _questions(told["questions_path"])
    work = told["work"] or Path(f"{described.cartridge_id}.training")
    training = authoring("training.train")
    author = authoring("models").load_author(
        model,
        device=told["device"],
        dtype=told["dtype"],
        computes_in="float32" if _is_cpu(told["device"]) else "",
    )
    with (
        _heard() as is_stopped,
        Progress(quiet=described.as_json).task(
            f"cartridge {described.cartridge_id}", steps=settings.num_steps
        ) as task,
    ):
        course = training.Course(
            author,
            text,
            settings,
            questions,
            lambda doing, steps_done: task.say(doing, steps_done=steps_done),
            is_stopped,
        )
        try:
            trained = training.train(course, work)
        except training.Stopped:
            click.echo(f"stopped; the same command goes on from {work}", err=True)
            click.get_current_context().exit(EXIT_STOPPED)
        entry = described.register(
            trained.built, method="trained", model=model, block_tokens=told["block_tokens"]
        )
    plot = told["plot"] or work / "loss.svg"
    write_plot(described.cartridge_id, trained.record, plot)
    described.say(entry, "trained", training=msgspec.to_builtins(trained.record), plot=str(plot))
    if not described.as_json:
        _show(trained.record, plot)


def _is_cpu(device: str) -> bool:
    return bool(authoring("models").choose_device(device) == "cpu")


def _checked_settings(told: dict[str, Any]) -> Any:
    kind = authoring("training.settings").TrainingSettings
    given = {name: told[name] for name, *_ in _NUMBERS.values() if told[name] is not None}
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        name = str(error).rpartition("$.")[2].strip("`")
        options = {field: option for option, (field, *_) in _NUMBERS.items()}
        raise InputError(
            f"--{options.get(name, name)}: {str(error).partition(' - ')[0]}"
        ) from error


def _questions(path: Path | None) -> list[tuple[str, str]]:
    if path is None:
        return []
    try:
        lines = [line for line in path.read_bytes().splitlines() if line.strip()]
        asked = [msgspec.json.decode(line, type=_Question) for line in lines]
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): name another") from error
    except msgspec.DecodeError as error:
        raise InputError(
            f'{path} has a line that is not {{"question": ..., "answer": ...}} ({error}): mend it'
        ) from error
    if not asked:
        raise InputError(f"{path} has no questions: write one in each line, or leave it out")
    return [(each.question, each.answer) for each in asked]


@contextmanager
def _heard() -> Iterator[Callable[[], bool]]:
    """Let the first signal ask for a stop; the second one stops at once."""
    asked: list[int] = []
    before: dict[int, Any] = {}

    def hear(number: int, _frame: object) -> None:
        asked.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, hear)
    try:
        yield lambda: bool(asked)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _show(record: Any, plot: Path) -> None:
    click.echo(
        f"{record.num_tokens} tokens in place of {record.num_document_tokens} "
        f"({record.ratio:.1f} times fewer), {record.num_steps} steps; losses by step: {plot}"
    )
    both = {
        "answers that the model made up": record.conversations,
        "your answers": record.questions,
    }
    for name, losses in both.items():
        if losses is not None:
            click.echo(
                f"loss of {name}, in nats per token: without the text {losses.nothing:.2f}, with "
                f"its beginning {losses.beginning:.2f}, with the cartridge {losses.cartridge:.2f}, "
                f"with the text {losses.text:.2f}"
            )
