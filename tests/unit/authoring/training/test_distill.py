"""A prefix learns what a document makes a model expect."""

import pytest
import torch

from kvkeep.authoring.prefill import prefilled_cache
from kvkeep.authoring.training.distill import Student, learning_rate, lessons_of_step
from kvkeep.authoring.training.forward import Layers, layers_of
from kvkeep.authoring.training.self_study import Conversation
from kvkeep.authoring.training.settings import TrainingSettings
from kvkeep.authoring.training.teacher import Lesson, lessons_of, mean_distance
from kvkeep.model.errors import CorruptDataError
from tests.unit.authoring.tiny import tiny_author, tiny_model

MODEL = tiny_model()
SETTINGS = TrainingSettings(num_tokens=4, num_steps=40, num_per_step=2, learning_rate=0.1)
IDS = [3, 99, 41, 7, 180, 66, 20, 31, 2, 77, 54, 140]


@pytest.fixture(scope="module")
def document() -> Layers:
    """KV of twelve tokens."""
    return layers_of(prefilled_cache(tiny_author(MODEL), IDS))


@pytest.fixture(scope="module")
def lessons(document: Layers) -> list[Lesson]:
    """Four conversations."""
    made = [Conversation([start, start + 1], [start + 9, 50]) for start in (10, 60, 110, 160)]
    return lessons_of(MODEL, document, made)


def learnt(student: Student, lessons: list[Lesson], num_steps: int) -> list[float]:
    """Losses of so many further steps."""
    steps = range(student.steps_done, student.steps_done + num_steps)
    return [student.learn(MODEL, lessons_of_step(lessons, SETTINGS, step)) for step in steps]


def test_it_begins_as_the_document_begins(document: Layers) -> None:
    """The first tokens' own KV."""
    for (key, value), (whole_key, whole_value) in zip(
        Student(document, SETTINGS).layers(), document, strict=True
    ):
        assert torch.equal(key, whole_key[:, :, :4])
        assert torch.equal(value, whole_value[:, :, :4])


def test_it_comes_nearer(document: Layers, lessons: list[Lesson]) -> None:
    """The loss falls, and the frozen token stays as it was."""
    student = Student(document, SETTINGS)
    before = mean_distance(MODEL, student.layers(), lessons)
    learnt(student, lessons, 40)
    after = mean_distance(MODEL, student.layers(), lessons)

    assert after < 0.7 * before
    for (key, value), (whole_key, whole_value) in zip(student.layers(), document, strict=True):
        assert torch.equal(key[:, :, :1], whole_key[:, :, :1])
        assert torch.equal(value[:, :, :1], whole_value[:, :, :1])
        assert not torch.equal(key[:, :, 1:], whole_key[:, :, 1:4])


def test_the_model_and_the_document_stay_as_they_are(
    document: Layers, lessons: list[Lesson]
) -> None:
    """Only the prefix is trained."""
    weights = [weight.clone() for weight in MODEL.parameters()]
    kept = [(key.clone(), value.clone()) for key, value in document]
    learnt(Student(document, SETTINGS), lessons, 3)

    assert all(map(torch.equal, weights, MODEL.parameters()))
    assert all(
        torch.equal(*both)
        for pair in zip(kept, document, strict=True)
        for both in zip(*pair, strict=True)
    )


def test_going_on_is_as_not_having_stopped(document: Layers, lessons: list[Lesson]) -> None:
    """Bit by bit, the optimizer's memory included."""
    straight, stopped, other = (Student(document, SETTINGS) for _ in range(3))
    wanted = learnt(straight, lessons, 6)
    losses = learnt(stopped, lessons, 3)
    other.go_on(stopped.state())
    losses += learnt(other, lessons, 3)

    assert losses == wanted
    for mine, theirs in zip(other.layers(), straight.layers(), strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])


def test_a_state_of_another_student_is_refused(document: Layers) -> None:
    """Other shapes, or no state at all."""
    longer = Student(document, TrainingSettings(num_tokens=5))
    student = Student(document, SETTINGS)

    for state in (longer.state(), {}, {"moving": 3}):
        with pytest.raises(CorruptDataError, match="is not of this training"):
            student.go_on(state)


def test_every_lesson_comes_once_each_time_round(lessons: list[Lesson]) -> None:
    """In another order the next time; equal for equal settings."""
    first = lessons_of_step(lessons, SETTINGS, 0) + lessons_of_step(lessons, SETTINGS, 1)
    rounds = [
        [
            id(each)
            for half in (0, 1)
            for each in lessons_of_step(lessons, SETTINGS, 2 * turn + half)
        ]
        for turn in range(6)
    ]

    assert sorted(map(id, first)) == sorted(map(id, lessons))
    assert all(sorted(each) == sorted(rounds[0]) for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1


def test_the_learning_rate_rises_and_falls() -> None:
    """Never to nothing, and never above what was asked for."""
    rates = [learning_rate(SETTINGS, step) for step in range(40)]

    assert rates[0] == SETTINGS.learning_rate / 2
    assert max(rates) == SETTINGS.learning_rate
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] > 0
