"""The ``.pt`` forms of cartridges: which are understood, and what is said of the others."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kvkeep.cartridges.checkpoint import read_checkpoint, write_checkpoint
from kvkeep.client.sequence_tensors import as_tensor
from kvkeep.model.errors import CorruptDataError, InputError
from tests.unit.cartridges.made import contents


def kv(num_tokens: int = 6, heads: int = 2, dim: int = 4, dtype: str = "float32") -> torch.Tensor:
    return torch.randn(1, heads, num_tokens, dim).to(getattr(torch, dtype))


def cache(num_layers: int = 2, num_frozen: int = 0, prefix: str = "frozen") -> dict[str, Any]:
    """What a trainer saves."""
    made: dict[str, Any] = {
        f"trainable_{kind}": [kv() for _ in range(num_layers)] for kind in ("keys", "values")
    }
    if num_frozen:
        for kind in ("keys", "values"):
            made[f"{prefix}_{kind}"] = [kv(num_frozen) for _ in range(num_layers)]
    return made


def saved(folder: Path, value: object) -> Path:
    path = folder / "cart.pt"
    torch.save(value, path)
    return path


# ---- Understood


def test_without_frozen_tokens(tmp_path: Path) -> None:
    """Keys and values of every layer, tokens first."""
    made = cache()
    found = read_checkpoint(saved(tmp_path, made))

    assert (len(found.layers), found.shape, found.num_frozen_tokens) == (2, (6, 2, 4), 0)
    for layer_idx, (key, value) in enumerate(found.layers):
        assert key == as_tensor(made["trainable_keys"][layer_idx][0].transpose(0, 1))
        assert value == as_tensor(made["trainable_values"][layer_idx][0].transpose(0, 1))


@pytest.mark.parametrize("prefix", ["frozen", "fixed"])
def test_frozen_tokens_come_first(tmp_path: Path, prefix: str) -> None:
    """Under either name: the trained ones were trained behind them."""
    made = cache(num_frozen=2, prefix=prefix)
    found = read_checkpoint(saved(tmp_path, made))

    assert (found.num_tokens, found.num_frozen_tokens) == (8, 2)
    both = torch.cat([made[f"{prefix}_keys"][1], made["trainable_keys"][1]], dim=2)
    assert found.layers[1][0] == as_tensor(both[0].transpose(0, 1))


def test_empty_lists_are_as_good_as_none(tmp_path: Path) -> None:
    """As a prefill of plain text is saved."""
    made = cache() | {"frozen_keys": [], "frozen_values": [], "fixed_keys": []}

    assert read_checkpoint(saved(tmp_path, made)).num_frozen_tokens == 0


def test_parameters_lists_of_them_and_a_cache_within(tmp_path: Path) -> None:
    """What trainers save is taken as it is."""
    plain = cache(num_frozen=1)
    lists = {name: torch.nn.ParameterList(map(torch.nn.Parameter, plain[name])) for name in plain}
    wanted = read_checkpoint(saved(tmp_path, plain)).layers

    assert read_checkpoint(saved(tmp_path, lists)).layers == wanted
    assert read_checkpoint(saved(tmp_path, {"cache": plain, "step": 5})).layers == wanted


@pytest.mark.parametrize("num_frozen", [0, 2, 6])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_exported_is_imported(tmp_path: Path, dtype: str, num_frozen: int) -> None:
    """Bit by bit, by kvkeep and by torch, which runs nothing in it either."""
    kept = contents(3, dtype=dtype, num_frozen_tokens=num_frozen)
    path = tmp_path / "cart.pt"
    write_checkpoint(path, kept)

    found = read_checkpoint(path)
    loaded = torch.load(path, weights_only=True)

    assert (found.layers, found.num_frozen_tokens) == (kept.layers, num_frozen)
    assert tuple(loaded["trainable_keys"][2].shape) == (1, 2, 6 - num_frozen, 4)
    assert len(loaded["frozen_values"]) == (3 if num_frozen else 0)
    assert [each.name for each in tmp_path.iterdir()] == ["cart.pt"]


def test_a_place_that_can_t_be_written_is_bad_input(tmp_path: Path) -> None:
    """One sentence, which names it."""
    with pytest.raises(InputError, match="can't be written to"):
        write_checkpoint(tmp_path / "gone" / "cart.pt", contents())


# ---- Refused by name


def without(name: str) -> dict[str, Any]:
    made = cache(num_frozen=1)
    del made[name]
    return made


def with_layer(name: str, tensor: object, num_frozen: int = 1) -> dict[str, Any]:
    made = cache(num_frozen=num_frozen)
    made[name][1] = tensor
    return made


def shorter(name: str) -> dict[str, Any]:
    made = cache(num_layers=4, num_frozen=1)
    made[name] = made[name][:3]
    return made


REFUSED: list[tuple[Any, str]] = [
    ("not a cartridge", "Unrecognized cartridge format: str"),
    ([kv()], "Unrecognized cartridge format: list"),
    ({"some_field": 42}, "Cannot find trainable_keys"),
    ({"trainable_keys": kv()}, "Cannot find trainable_keys"),
    (without("trainable_keys"), "Cannot find trainable_keys"),
    (without("trainable_values"), "Cannot find trainable_values"),
    (without("frozen_keys"), "Cannot find frozen_keys"),
    (without("frozen_values"), "Cannot find frozen_values"),
    ({"trainable_keys": [], "trainable_values": []}, "the cartridge is empty"),
    (shorter("trainable_values"), r"trainable_values length \(3\) != trainable_keys length \(4\)"),
    (shorter("frozen_keys"), r"frozen_keys length \(3\) != trainable_keys length \(4\)"),
    (shorter("frozen_values"), r"frozen_values length \(3\) != trainable_keys length \(4\)"),
    (
        cache(num_frozen=1) | cache(num_frozen=1, prefix="fixed"),
        "both frozen_keys and fixed_keys, which mean the same: keep one",
    ),
    (
        with_layer("trainable_keys", kv(3)),
        r"Layer 1 K shape \(1, 2, 3, 4\) != layer 0 K shape \(1, 2, 6, 4\)",
    ),
    (with_layer("trainable_values", kv(3)), r"Layer 1 V shape \(1, 2, 3, 4\) != layer 0 K shape"),
    (with_layer("trainable_keys", kv(dim=2)), r"Layer 1 K shape \(1, 2, 6, 2\)"),
    (with_layer("trainable_keys", kv(heads=1)), r"Layer 1 K shape \(1, 1, 6, 4\)"),
    (with_layer("frozen_values", kv(2)), r"Layer 1 V shape \(1, 2, 2, 4\) != layer 0 K shape"),
    (with_layer("frozen_keys", kv(1, heads=4)), r"Layer 1 K shape \(1, 4, 1, 4\)"),
    (with_layer("trainable_keys", kv(dtype="bfloat16")), "Layer 1 K dtype bfloat16 != layer 0 K"),
    (with_layer("trainable_keys", kv()[0]), r"Layer 1 of trainable_keys has the shape \(2, 6, 4\)"),
    (with_layer("trainable_keys", kv().repeat(2, 1, 1, 1)), r"has the shape \(2, 2, 6, 4\): save"),
    (with_layer("trainable_keys", kv().double()), "Layer 1 of trainable_keys is float64"),
    (with_layer("trainable_keys", "x"), "Layer 1 of trainable_keys is no tensor"),
    (with_layer("trainable_keys", kv() * torch.nan), "Layer 1 K holds NaN or Inf"),
    (with_layer("trainable_values", kv() / 0), "Layer 1 V holds NaN or Inf"),
    ({"trainable_keys": [kv(0)], "trainable_values": [kv(0)]}, "the cartridge is empty"),
]


@pytest.mark.parametrize(("value", "told"), REFUSED, ids=[told for _, told in REFUSED])
def test_what_is_wrong_is_named(tmp_path: Path, value: object, told: str) -> None:
    """The sentence names the file, the layer and both values."""
    with pytest.raises(InputError, match=told) as caught:
        read_checkpoint(saved(tmp_path, value))
    assert str(caught.value).startswith(str(tmp_path / "cart.pt"))


def test_an_object_is_refused_by_its_class(tmp_path: Path) -> None:
    """It would need its code to be run."""
    with pytest.raises(InputError, match=r"cart\.pt holds torch\.nn\.modules\..*could run code"):
        read_checkpoint(saved(tmp_path, torch.nn.Linear(1, 1)))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    """No tensor of it is used."""
    path = saved(tmp_path, cache())
    path.write_bytes(path.read_bytes()[:-200])

    with pytest.raises(CorruptDataError, match=r"is truncated, damaged or no file of torch.save"):
        read_checkpoint(path)
