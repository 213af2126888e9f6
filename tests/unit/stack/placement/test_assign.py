"""Which engine gets which GPUs and cores, on machines made up for the test."""

from pathlib import Path
from typing import Any

import pytest

from kvkeep.model.errors import InputError
from kvkeep.stack.placement.assign import (
    assign_gpus,
    find_gpus,
    fits_without_a_word,
    share_cores,
)
from kvkeep.stack.spec import EngineSpec


def engine(name: str, **fields: Any) -> EngineSpec:
    return EngineSpec(name=name, **fields)


def gpus(count: int) -> list[str]:
    return [str(idx) for idx in range(count)]


def test_prefill_engines_choose_first() -> None:
    """Whatever the order in the file; then those that decode, then the rest."""
    engines = [
        engine("s"),
        engine("d", role="decode", tensor_parallel=2),
        engine("p", role="prefill", tensor_parallel=2),
        engine("q", role="prefill"),
    ]

    assert assign_gpus(engines, gpus(8)) == {
        "p": ("0", "1"),
        "q": ("2",),
        "d": ("3", "4"),
        "s": ("5",),
    }


def test_named_gpus_are_nobody_else_s_unless_named_again() -> None:
    """Engines that name the same ones share them."""
    engines = [engine("a"), engine("b", gpus=[0]), engine("c", gpus=["0", 2]), engine("d", gpus=2)]

    assert assign_gpus(engines, gpus(5)) == {
        "b": ("0",),
        "c": ("0", "2"),
        "a": ("1",),
        "d": ("3", "4"),
    }


@pytest.mark.parametrize(
    ("engines", "sentence"),
    [
        (
            [engine("p", role="prefill", tensor_parallel=2), engine("d", role="decode")],
            "engine d: it needs 1 GPU, and of the 2 GPUs here 0 are left; lower tensor_parallel",
        ),
        ([engine("a", gpus=3)], "engine a: it needs 3 GPUs, and of the 2 GPUs here 2 are left"),
        ([engine("a", gpus=[7])], "engine a: there is no GPU 7 here, only 0, 1; choose from these"),
    ],
)
def test_too_few_gpus_are_refused(engines: list[EngineSpec], sentence: str) -> None:
    """The engine that goes without is named, with what to do."""
    with pytest.raises(InputError) as caught:
        assign_gpus(engines, gpus(2))

    assert str(caught.value).startswith(sentence)


def test_engines_that_are_not_started_here_get_none() -> None:
    """Nor does one whose environment says what it sees."""
    engines = [
        engine("far", url="http://10.0.0.1:8000"),
        engine("own", env={"CUDA_VISIBLE_DEVICES": "3"}),
        engine("a"),
    ]

    assert assign_gpus(engines, gpus(1)) == {"a": ("0",)}


@pytest.mark.parametrize(
    ("fields", "fits"),
    [({}, False), ({"gpus": 1}, True), ({"role": "prefill"}, True), ({"gpus": [0]}, True)],
)
def test_engines_that_say_nothing_may_share(fields: dict[str, Any], fits: bool) -> None:
    """Two plain engines on one GPU are as they ever were; a word about GPUs or roles counts."""
    assert fits_without_a_word([engine("a"), engine("b", **fields)], gpus(1)) == fits
    assert fits_without_a_word([engine("a"), engine("b", **fields)], gpus(2))


def test_gpus_are_found_by_variable_or_by_device(tmp_path: Path) -> None:
    """The variable wins, for engines are its heirs."""
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()

    assert find_gpus({}, tmp_path) == ["0", "1"]
    assert find_gpus({"CUDA_VISIBLE_DEVICES": "2, GPU-af"}, tmp_path) == ["2", "GPU-af"]
    assert find_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []


@pytest.mark.parametrize(
    ("engines", "cores", "shares"),
    [
        ([engine("a"), engine("b")], 2, {"a": [0], "b": [1]}),
        ([engine("a"), engine("b", role="prefill")], 3, {"b": [0, 1], "a": [2]}),
        ([engine("a", tensor_parallel=2), engine("b")], 6, {"a": [0, 1, 2, 3], "b": [4, 5]}),
        ([engine("a", cpus=[0]), engine("b")], 4, {"b": [1, 2, 3]}),
        ([engine("a"), engine("b"), engine("c")], 2, {}),
        ([engine("a", cpus="0-1"), engine("b")], 4, {}),
        ([engine("a", url="http://10.0.0.1:1"), engine("b")], 2, {"b": [0, 1]}),
    ],
)
def test_cores_are_shared_out(
    engines: list[EngineSpec], cores: int, shares: dict[str, list[int]]
) -> None:
    """As many for each rank; all for all where there are too few."""
    assert share_cores(engines, range(cores)) == shares
