"""From a text to a trained cartridge, in steps that can be stopped and gone on with."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvkeep.adapters.dynamic_cache import cache_of, from_dynamic_cache
from kvkeep.authoring.built import Built
from kvkeep.authoring.models import Author
from kvkeep.authoring.prefill import prefilled_cache
from kvkeep.authoring.texts import answer_ids, document_ids, question_ids
from kvkeep.authoring.training.distill import Student, lessons_of_step
from kvkeep.authoring.training.folder import TrainingFolder, opened
from kvkeep.authoring.training.forward import Layers, layers_of
from kvkeep.authoring.training.record import Losses, Record, Step
from kvkeep.authoring.training.self_study import (
    Conversation,
    Reader,
    is_held_out,
    make_up,
)
from kvkeep.authoring.training.settings import TrainingSettings
from kvkeep.authoring.training.teacher import (
    Lesson,
    answer_loss,
    lessons_of,
    mean_distance,
)
from kvkeep.model.errors import CapacityError, InputError, RefusedError

KEPT_EVERY_STEPS = 20
JUDGED_TIMES = 12
"""How often the held-out conversations are looked at on the way."""

SAID_EVERY_STEPS = 10
Say = Callable[[str, int], object]
"""Told what is being done, and how many steps are done."""


class Stopped(Exception):
    """The training was asked to stop; what it has so far is kept."""


@dataclass(frozen=True)
class Trained:
    """A trained cartridge, and how well it does."""

    built: Built
    record: Record


@dataclass(frozen=True)
class Course:
    """What a training needs that does not change on its way."""

    author: Author
    text: str
    settings: TrainingSettings
    questions: Sequence[tuple[str, str]] = ()
    """Questions and right answers that the cartridge is judged by, and never trained on."""
    say: Say = lambda doing, steps_done: None
    is_stopped: Callable[[], bool] = lambda: False


def train(course: Course, work: Path) -> Trained:
    """Train a cartridge; what a stopped training did in the same folder is not done again.

    Raises:
        InputError: The text is too short or too long, or the folder is another training's.
        Stopped: ``is_stopped`` said so; the same call goes on from there.
        RefusedError: The loss is no number any more.
        CapacityError: There is not enough memory, or no room in the folder.
        CorruptDataError: The folder's files are damaged.
    """
    try:
        with opened(work) as folder:
            return _train(course, folder)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise CapacityError(
            "the training needs more memory than there is: take fewer conversations in a step, a "
            "shorter text, or a larger machine"
        ) from error


def _train(course: Course, folder: TrainingFolder) -> Trained:
    author, settings = course.author, course.settings
    weights = author.identity.get("weights", author.name)
    folder.check_digest(settings.digest(course.text, f"{weights} {author.model.dtype}"))
    token_ids = document_ids(author.tokenizer, course.text, "none", author.tokens_max)
    _check_lengths(settings, len(token_ids))
    course.say(f"reading {len(token_ids)} tokens", 0)
    document = layers_of(prefilled_cache(author, token_ids))
    made = _conversations(course, document, folder)
    course.say(f"learning what to expect in {len(made)} conversations", 0)
    lessons = lessons_of(author.model, document, made)
    student = Student(document, settings)
    steps = _study(course, folder, student, lessons)
    course.say("judging the result", settings.num_steps)
    cartridge = _rounded(student.layers(), author.dtype)
    contents = from_dynamic_cache(cache_of(cartridge), num_frozen_tokens=settings.num_frozen_tokens)
    held_out = [each for idx, each in enumerate(made) if is_held_out(idx)]
    asked = [
        Conversation(question_ids(author.tokenizer, question), answer_ids(author.tokenizer, answer))
        for question, answer in course.questions
    ]
    record = Record(
        num_tokens=settings.num_tokens,
        num_document_tokens=len(token_ids),
        num_steps=settings.num_steps,
        steps=steps,
        conversations=_losses(author, document, cartridge, held_out),
        questions=_losses(author, document, cartridge, asked) if asked else None,
    )
    return Trained(Built(contents, author.identity, settings.num_steps), record)


def _check_lengths(settings: TrainingSettings, num_tokens: int) -> None:
    if settings.num_frozen_tokens >= settings.num_tokens:
        raise InputError(
            f"{settings.num_frozen_tokens} frozen of {settings.num_tokens} tokens leave nothing to "
            "train: freeze fewer"
        )
    if settings.num_tokens > num_tokens:
        raise InputError(
            f"the text has {num_tokens} tokens and the cartridge would have {settings.num_tokens}: "
            "name fewer --tokens, or build it instead"
        )


def _conversations(course: Course, document: Layers, folder: TrainingFolder) -> list[Conversation]:
    made = folder.conversations()
    total = course.settings.num_conversations
    reader = Reader(course.author, document, course.settings, lambda: _check_stopped(course))
    for batch in make_up(reader, course.text, made):
        made += batch
        folder.keep_conversations(made)
        course.say(f"made up {len(made)} of {total} conversations", 0)
        _check_stopped(course)
    return made


def _study(
    course: Course, folder: TrainingFolder, student: Student, lessons: Sequence[Lesson]
) -> list[Step]:
    """Train to the end; what happened in each step, earlier runs included."""
    model, settings = course.author.model, course.settings
    held_out = [each for idx, each in enumerate(lessons) if is_held_out(idx)]
    kept = [each for idx, each in enumerate(lessons) if not is_held_out(idx)]
    steps: list[Step] = []
    state = folder.state()
    if state is not None:
        student.go_on(state)
        steps = [Step(*row) for row in state["steps"]]

    def keep() -> None:
        rows = [[each.step, each.trained_on, each.held_out] for each in steps]
        folder.keep_state(student.state() | {"steps": rows})

    judged_every = max(settings.num_steps // JUDGED_TIMES, 1)
    while (step_idx := student.steps_done) < settings.num_steps:
        judged = None
        if step_idx % judged_every == 0:
            judged = mean_distance(model, student.layers(), held_out)
        loss = student.learn(model, lessons_of_step(kept, settings, step_idx))
        if not math.isfinite(loss):
            raise RefusedError(
                f"the loss is no number any more at step {step_idx}: train anew with a lower "
                "--learning-rate"
            )
        steps.append(Step(step_idx, loss, judged))
        if step_idx % SAID_EVERY_STEPS == 0:
            course.say(f"step {step_idx} of {settings.num_steps}, loss {loss:.3f}", step_idx)
        if student.steps_done % KEPT_EVERY_STEPS == 0 or course.is_stopped():
            keep()
        _check_stopped(course)
    keep()
    return steps


def _check_stopped(course: Course) -> None:
    if course.is_stopped():
        raise Stopped


def _rounded(layers: Layers, dtype: str) -> Layers:
    """As the cartridge has them."""
    named = getattr(torch, dtype)
    return [(key.detach().to(named), value.detach().to(named)) for key, value in layers]


def _losses(
    author: Author, document: Layers, cartridge: Layers, asked: Sequence[Conversation]
) -> Losses:
    num_tokens = cartridge[0][0].shape[2]
    beginning = [(key[:, :, :num_tokens], value[:, :, :num_tokens]) for key, value in document]
    return Losses(
        nothing=answer_loss(author.model, None, asked),
        beginning=answer_loss(author.model, beginning, asked),
        cartridge=answer_loss(author.model, cartridge, asked),
        text=answer_loss(author.model, document, asked),
    )
