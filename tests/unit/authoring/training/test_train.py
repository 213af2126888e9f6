"""From a text to a trained cartridge, also when somebody stops it on the way."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from kvkeep.authoring.training.distill import lessons_of_step
from kvkeep.authoring.training.folder import opened
from kvkeep.authoring.training.settings import TrainingSettings
from kvkeep.authoring.training.teacher import answer_loss
from kvkeep.authoring.training.train import Course, Stopped, train
from kvkeep.model.errors import InputError, RefusedError
from tests.unit.authoring.tiny import TEXT, tiny_author, tiny_model

MODEL = tiny_model()
SETTINGS = TrainingSettings(
    num_tokens=12,
    num_steps=8,
    num_conversations=20,
    num_per_step=2,
    answer_tokens_max=4,
    learning_rate=0.05,
)


def course(**more: Any) -> Course:
    """A training of a second."""
    fields: dict[str, Any] = {
        "author": tiny_author(MODEL, dtype="bfloat16"),
        "text": TEXT,
        "settings": SETTINGS,
    }
    return Course(**(fields | more))


def test_a_trained_cartridge_says_how_well_it_does(tmp_path: Path) -> None:
    """Fewer tokens, no ids, a frozen one, and losses of every step and at the end."""
    trained = train(course(questions=[("Who is the miller?", "Ada Finch.")]), tmp_path)
    kv, record = trained.built.contents, trained.record

    assert (kv.num_tokens, kv.dtype, kv.num_frozen_tokens) == (12, "bfloat16", 1)
    assert kv.token_ids is None
    assert trained.built.num_training_steps == 8
    assert [each.step for each in record.steps] == list(range(8))
    assert record.ratio == len(TEXT.encode()) / 12
    assert record.questions is not None
    assert record.conversations.cartridge != record.conversations.beginning


@pytest.mark.parametrize("after", ["made up 16", "step 0 of 8"])
def test_a_stopped_training_goes_on_to_the_same_end(tmp_path: Path, after: str) -> None:
    """Bit by bit, wherever it was stopped."""
    said: list[str] = []
    stopping = course(
        say=lambda doing, steps_done: said.append(doing),
        is_stopped=lambda: any(each.startswith(after) for each in said),
    )
    with pytest.raises(Stopped):
        train(stopping, tmp_path / "stopped")
    gone_on = train(course(), tmp_path / "stopped")
    straight = train(course(), tmp_path / "straight")

    assert list(gone_on.built.contents.layers) == list(straight.built.contents.layers)
    assert gone_on.record == straight.record


def test_what_is_held_out_is_never_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every eighth conversation is judged alone, and all others are learnt."""
    learnt: list[list[int]] = []
    judged: list[list[int]] = []

    def chosen(lessons: Any, *args: Any) -> Any:
        learnt.extend(each.token_ids for each in lessons)
        return lessons_of_step(lessons, *args)

    def reckoned(model: Any, layers: Any, asked: Any) -> float:
        judged.extend(each.token_ids for each in asked)
        return answer_loss(model, layers, asked)

    monkeypatch.setattr("kvkeep.authoring.training.train.lessons_of_step", chosen)
    monkeypatch.setattr("kvkeep.authoring.training.train.answer_loss", reckoned)
    train(course(), tmp_path)
    with opened(tmp_path) as folder:
        made = [each.token_ids for each in folder.conversations()]

    held_out = made[7::8]
    assert [each for each in made if each in judged] == held_out
    assert [each for each in made if each not in learnt] == held_out


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    """Its state is used as it is."""
    first = train(course(), tmp_path)
    said: list[str] = []
    again = train(course(say=lambda doing, steps_done: said.append(doing)), tmp_path)

    assert not any(each.startswith(("step", "made up")) for each in said)
    assert list(again.built.contents.layers) == list(first.built.contents.layers)


def test_a_folder_of_another_text_is_refused(tmp_path: Path) -> None:
    """Or of other settings."""
    train(course(), tmp_path)
    other = dataclasses.replace(course(), text=TEXT + " The end.")

    with pytest.raises(InputError, match="name another --work folder"):
        train(other, tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_tokens": 500}, "the text has 166 tokens and the cartridge would have 500"),
        ({"num_frozen_tokens": 12}, "12 frozen of 12 tokens leave nothing to train"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, int], sentence: str
) -> None:
    """Before anything is made up."""
    fields = {name: getattr(SETTINGS, name) for name in SETTINGS.__struct_fields__}
    settings = TrainingSettings(**(fields | change))

    with pytest.raises(InputError, match=sentence):
        train(course(settings=settings), tmp_path)
    assert not (tmp_path / "conversations.jsonl").exists()


def test_a_loss_that_is_no_number_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a cartridge of NaN is kept."""
    monkeypatch.setattr(
        "kvkeep.authoring.training.distill.distance",
        lambda *_: torch.tensor(float("nan"), requires_grad=True),
    )

    with pytest.raises(RefusedError, match="no number any more at step 0: train anew with a lower"):
        train(course(), tmp_path)
    assert not (tmp_path / "state.pt").exists()
