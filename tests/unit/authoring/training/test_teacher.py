"""What is to be expected, and how far an expectation is from it."""

import math

import torch

from kvkeep.authoring.prefill import prefilled_cache
from kvkeep.authoring.training.forward import Layers, layers_of, logits_behind
from kvkeep.authoring.training.self_study import Conversation
from kvkeep.authoring.training.teacher import (
    LIKELIEST,
    Lesson,
    answer_loss,
    distance,
    lessons_of,
    mean_distance,
)
from tests.unit.authoring.tiny import tiny_author, tiny_model

MODEL = tiny_model()
MADE = [Conversation([1, 2, 3], [4, 5]), Conversation([9], [8, 7, 6])]


def layers(*ids: int) -> Layers:
    """KV of a document."""
    return layers_of(prefilled_cache(tiny_author(MODEL), list(ids)))


def test_the_teacher_is_no_distance_from_itself() -> None:
    """And whoever has another document, or none, is some."""
    document = layers(30, 31, 32, 33)
    lessons = lessons_of(MODEL, document, MADE)

    assert abs(mean_distance(MODEL, document, lessons)) < 1e-5
    assert mean_distance(MODEL, layers(5, 200), lessons) > 0.01
    assert mean_distance(MODEL, None, lessons) > 0.01


def test_the_distance_is_below_that_of_the_whole_distributions() -> None:
    """Others are taken together, which can only bring two lists nearer; but not much."""
    document = layers(30, 31, 32, 33)
    (lesson,) = lessons_of(MODEL, document, MADE[:1])
    theirs = logits_behind(MODEL, document, [lesson.token_ids])[0].log_softmax(-1)[:-1]
    mine = logits_behind(MODEL, None, [lesson.token_ids])[0]
    whole = float((theirs.exp() * (theirs - mine.log_softmax(-1)[:-1])).sum())

    assert lesson.expected_ids.shape == (4, LIKELIEST)
    assert 0.5 * whole < float(distance(mine, lesson)) <= whole + 1e-5


def test_the_distance_is_that_of_its_definition() -> None:
    """One likely token and the rest, reckoned by hand."""
    lesson = Lesson([1, 2], 1, torch.tensor([[7]]), torch.tensor([[math.log(0.75)]]))
    mine = torch.full((2, 258), math.log(0.5 / 257))
    mine[0, 7] = math.log(0.5)

    wanted = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert math.isclose(float(distance(mine, lesson)), wanted, rel_tol=1e-5)


def test_the_loss_is_that_of_the_answers_alone() -> None:
    """The mean over their tokens, whatever the questions were."""
    document = layers(30, 31)
    total = 0.0
    for each in MADE:
        logits = MODEL(input_ids=torch.tensor([[30, 31, *each.token_ids]])).logits[0]
        for idx, token_id in enumerate(each.answer_ids):
            place = 2 + len(each.prompt_ids) + idx - 1
            total -= float(logits[place].log_softmax(-1)[token_id])

    assert math.isclose(answer_loss(MODEL, document, MADE), total / 5, rel_tol=1e-4)
