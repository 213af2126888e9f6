"""Layers of a sequence as tensors."""

import pytest

from kvkeep.model.errors import InputError
from kvkeep.protocol.sequence_body import (
    LAYERS_MAX,
    check_name,
    pair_layers,
    parse_layers,
    tensor_name,
)
from kvkeep.protocol.tensors import TensorPlace


def place(name: str, *shape: int) -> TensorPlace:
    """A tensor of a body."""
    return TensorPlace(name, "int8", shape or (2, 3, 4), 0, 24)


def test_keys_and_values_find_each_other() -> None:
    """Their heads and dims may differ, their tokens may not; layers come in order."""
    found = pair_layers(
        [
            place("layers.10.value", 2, 1, 8),
            place("layers.9.key"),
            place("layers.10.key"),
            place("layers.9.value"),
        ]
    )

    assert list(found) == [9, 10]
    assert found[10][0].name == "layers.10.key"
    assert found[10][1].shape == (2, 1, 8)


@pytest.mark.parametrize(
    "places",
    [
        [place("layers.0.key")],
        [place("layers.0.value")],
        [place("layers.0.key"), place("layers.1.value")],
        [place("layers.0.key", 2, 3, 4), place("layers.0.value", 3, 3, 4)],
        [place("layers.0.key", 2, 3), place("layers.0.value", 2, 3)],
        [place("layers.0.key", 0, 3, 4), place("layers.0.value", 0, 3, 4)],
        [place("layers.0.key", 2, 3, 0), place("layers.0.value", 2, 3, 0)],
        [place("layers.00.key"), place("layers.00.value")],
        [place("layers.-1.key"), place("layers.-1.value")],
        [place(f"layers.{LAYERS_MAX}.key"), place(f"layers.{LAYERS_MAX}.value")],
        [place("layers.0.key"), place("layers.0.value"), place("embedding")],
        [place("layers.0.key\n"), place("layers.0.value")],
    ],
)
def test_any_other_tensors_are_refused(places: list[TensorPlace]) -> None:
    """What is missing, too much, of another shape or of another name."""
    with pytest.raises(InputError):
        pair_layers(places)


@pytest.mark.parametrize("name", ["a", "chat:7", "A.b_c-d@e:9", "x" * 256])
def test_a_name(name: str) -> None:
    """Letters, digits and some signs."""
    check_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "ä", "x" * 257, "a\n", "-a", "a%"])
def test_what_is_no_name_is_refused(name: str) -> None:
    """Nor anything that an address could mean otherwise."""
    with pytest.raises(InputError, match="sequence's name"):
        check_name(name)


def test_a_list_of_layers() -> None:
    """Each once, in order."""
    assert parse_layers("3,0,3") == [0, 3]
    assert tensor_name(3, "key") == "layers.3.key"


@pytest.mark.parametrize("text", ["", ",", "1,", "-1", "a", "1 ", "99999", "1;2", "1," * 600 + "1"])
def test_what_is_no_list_of_layers_is_refused(text: str) -> None:
    """Also one without end."""
    with pytest.raises(InputError, match="list of numbers"):
        parse_layers(text)
