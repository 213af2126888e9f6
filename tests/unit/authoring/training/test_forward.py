"""Requests of unlike lengths behind one prefix."""

import pytest
import torch

from kvkeep.authoring.prefill import prefilled_cache
from kvkeep.authoring.training.forward import layers_of, logits_behind
from kvkeep.authoring.training.sampling import Draw, sample
from tests.unit.authoring.tiny import tiny_author, tiny_model

DOCUMENT = [7, 70, 34, 99, 12]
ROWS = [[1, 2, 3], [200, 100], [50, 51, 52, 53]]


@pytest.fixture(scope="module")
def model() -> object:
    """A tiny Llama."""
    return tiny_model()


def alone(model: object, ids: list[int]) -> torch.Tensor:
    """Logits of one prompt by itself."""
    return model(input_ids=torch.tensor([ids])).logits[0]  # type: ignore[operator]


def test_rows_do_not_see_one_another(model: object) -> None:
    """Nor what fills the shorter ones up."""
    layers = layers_of(prefilled_cache(tiny_author(model), DOCUMENT))
    logits = logits_behind(model, layers, ROWS)

    for row, found in zip(ROWS, logits, strict=True):
        wanted = alone(model, DOCUMENT + row)[len(DOCUMENT) :]
        assert torch.allclose(found[: len(row)], wanted, atol=1e-4)


def test_without_a_prefix_rows_stand_alone(model: object) -> None:
    """At the positions 0, 1, ..."""
    logits = logits_behind(model, None, ROWS)

    for row, found in zip(ROWS, logits, strict=True):
        assert torch.allclose(found[: len(row)], alone(model, row), atol=1e-4)


def test_gradients_reach_the_prefix(model: object) -> None:
    """And its keys as well as its values, in every layer."""
    layers = [
        (key.clone().requires_grad_(), value.clone().requires_grad_())
        for key, value in layers_of(prefilled_cache(tiny_author(model), DOCUMENT))
    ]
    logits_behind(model, layers, ROWS).log_softmax(-1)[:, 1, 5].sum().backward()

    assert all(float(each.grad.abs().sum()) > 0 for pair in layers for each in pair)


def test_the_likeliest_tokens_are_those_of_each_prompt_alone(model: object) -> None:
    """Whatever stands beside it, and however long that is."""
    layers = layers_of(prefilled_cache(tiny_author(model), DOCUMENT))
    draw = Draw(temperature=0, seed=0, end_ids=frozenset())
    found = sample(model, layers, ROWS, tokens_max=5, draw=draw)

    for row, said in zip(ROWS, found, strict=True):
        whole = DOCUMENT + row
        for token_id in said:
            assert int(alone(model, whole)[-1].argmax()) == token_id
            whole = [*whole, token_id]
        assert len(said) == 5


def test_a_continuation_stops_at_its_end(model: object) -> None:
    """The others go on."""
    layers = layers_of(prefilled_cache(tiny_author(model), DOCUMENT))
    free = Draw(temperature=0, seed=0, end_ids=frozenset())
    first, *others = sample(model, layers, ROWS, tokens_max=6, draw=free)
    end_id = next(each for each in first if all(each not in other for other in others))
    ending = Draw(temperature=0, seed=0, end_ids=frozenset({end_id}))
    stopped, *went_on = sample(model, layers, ROWS, tokens_max=6, draw=ending)

    assert stopped == first[: first.index(end_id)]
    assert went_on == others


def test_drawing_follows_the_seed(model: object) -> None:
    """The same again, and something else with another one."""
    layers = layers_of(prefilled_cache(tiny_author(model), DOCUMENT))

    def drawn(seed: int) -> list[list[int]]:
        draw = Draw(temperature=3.0, seed=seed, end_ids=frozenset())
        return sample(model, layers, ROWS, tokens_max=6, draw=draw)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_what_is_asked_to_stop_stops(model: object) -> None:
    """At the next token."""
    layers = layers_of(prefilled_cache(tiny_author(model), DOCUMENT))
    asked: list[int] = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(model, layers, ROWS, tokens_max=9, draw=Draw(0, 0, frozenset()), check=check)
    assert len(asked) == 3
