"""The ``.pt`` files in which others keep cartridges: imported and exported.

A dictionary with ``trainable_keys`` and ``trainable_values``, and perhaps ``frozen_keys`` and
``frozen_values``, or ``fixed_keys`` and ``fixed_values``: lists of one tensor a layer,
``[1, heads, tokens, dim]``. Frozen tokens come first. Empty lists are as good as none. It may lie
in another dictionary, under ``cache``.

Shapes are checked before any tensor is read, and nothing in a file is ever run.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvkeep.cartridges.contents import Contents, make_contents
from kvkeep.cartridges.file_format import told_of_writing
from kvkeep.cartridges.manifest import DTYPES_OF_CARTRIDGES
from kvkeep.cartridges.torch_file import SavedTensor, TorchFile, write_torch_file
from kvkeep.client.sequence_tensors import Tensor, as_tensor
from kvkeep.model.errors import InputError

SUFFIXES = (".pt", ".pth")
_TRAINABLE = ("trainable_keys", "trainable_values")
_FROZEN = ("frozen", "fixed")


@dataclass(frozen=True)
class _Saved:
    """Lists that fit together, one entry a layer; frozen ones may be missing."""

    trainable: tuple[list[SavedTensor], list[SavedTensor]]
    frozen: tuple[list[SavedTensor], list[SavedTensor]] | None

    @property
    def num_frozen_tokens(self) -> int:
        """Tokens before the trained ones."""
        return 0 if self.frozen is None else self.frozen[0][0].shape[2]


def read_checkpoint(path: Path) -> Contents:
    """Import a ``.pt`` file.

    Raises:
        InputError: It can't be read, is of another form, its layers don't fit together, it holds
            NaN or infinities, or something that could run code.
        CorruptDataError: It is truncated, or none.
    """
    with TorchFile.opened(path) as file:
        told = file.describe()
        with _naming(path):
            saved = _find_lists(told)
        layers = [
            (_read_layer(file, saved, 0, layer_idx), _read_layer(file, saved, 1, layer_idx))
            for layer_idx in range(len(saved.trainable[0]))
        ]
    with _naming(path):
        return make_contents(layers, num_frozen_tokens=saved.num_frozen_tokens)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say of which file something is wrong."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path} can't be imported: {error}") from error


def write_checkpoint(path: Path, contents: Contents) -> None:
    """Export a ``.pt`` file, which ``torch.load(weights_only=True)`` reads; whole or not at all.

    Token ids and the manifest have no place in it.

    Raises:
        InputError: The place can't be written; what was there stays.
        CapacityError: The disk is full; what was there stays.
    """
    num_frozen = contents.num_frozen_tokens
    lists: dict[str, list[Tensor]] = {}
    for half, kind in enumerate(("keys", "values")):
        tensors = [layer[half] for layer in contents.layers]
        lists[f"trainable_{kind}"] = [_heads_first(tensor, num_frozen, None) for tensor in tensors]
        lists[f"frozen_{kind}"] = (
            [_heads_first(tensor, 0, num_frozen) for tensor in tensors] if num_frozen else []
        )
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with told_of_writing(path):
        try:
            with part.open("wb") as file:
                write_torch_file(file, path.stem or "archive", lists)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def _heads_first(tensor: Tensor, start: int, end: int | None) -> Tensor:
    """Some tokens as ``[heads, tokens, dim]``."""
    return as_tensor(tensor.bits()[start:end].transpose(1, 0, 2), tensor.dtype)


def _read_layer(file: TorchFile, saved: _Saved, half: int, layer_idx: int) -> Tensor:
    """Keys or values of a layer, ``[tokens, heads, dim]``, frozen tokens first."""
    parts = [saved.trainable[half][layer_idx]]
    if saved.frozen is not None:
        parts.insert(0, saved.frozen[half][layer_idx])
    bits = [file.read(part)[0].transpose(1, 0, 2) for part in parts]
    return as_tensor(np.concatenate(bits), parts[0].dtype)


# ---- Which lists there are, and whether they fit together


def _find_lists(told: Any) -> _Saved:
    if not isinstance(told, dict):
        raise InputError(
            f"Unrecognized cartridge format: {type(told).__name__} where a dictionary of "
            f"{_TRAINABLE[0]} and {_TRAINABLE[1]} is wanted"
        )
    cache = told["cache"] if isinstance(told.get("cache"), dict) else told
    for name in _TRAINABLE:
        if not isinstance(cache.get(name), list):
            raise InputError(f"Cannot find {name}: save one tensor a layer under that name")
    num_layers = len(cache[_TRAINABLE[0]])
    if num_layers == 0:
        raise InputError("the cartridge is empty: trainable_keys length is 0")
    trainable = _pair(cache, "trainable", num_layers)
    present = [prefix for prefix in _FROZEN if cache.get(f"{prefix}_keys")]
    alone = [prefix for prefix in _FROZEN if cache.get(f"{prefix}_values")]
    if len(present) > 1:
        raise InputError("it has both frozen_keys and fixed_keys, which mean the same: keep one")
    if present != alone:
        name = f"{(present or alone)[0]}_{'values' if present else 'keys'}"
        raise InputError(f"Cannot find {name}: save keys and values, or neither")
    frozen = _pair(cache, present[0], num_layers) if present else None
    _check_tensors(trainable, frozen)
    return _Saved(trainable, frozen)


def _pair(
    cache: Mapping[str, Any], prefix: str, num_layers: int
) -> tuple[list[SavedTensor], list[SavedTensor]]:
    """Keys and values of all layers under a prefix."""
    found: list[list[SavedTensor]] = []
    for kind in ("keys", "values"):
        name = f"{prefix}_{kind}"
        tensors = cache[name] if isinstance(cache[name], list) else []
        if len(tensors) != num_layers:
            raise InputError(
                f"{name} length ({len(tensors)}) != trainable_keys length ({num_layers})"
            )
        for layer_idx, tensor in enumerate(tensors):
            _check_tensor(name, layer_idx, tensor)
        found.append(tensors)
    return found[0], found[1]


def _check_tensor(name: str, layer_idx: int, tensor: Any) -> None:
    if not isinstance(tensor, SavedTensor):
        raise InputError(f"Layer {layer_idx} of {name} is no tensor")
    if len(tensor.shape) != 4 or tensor.shape[0] != 1:
        raise InputError(
            f"Layer {layer_idx} of {name} has the shape {tensor.shape}: "
            "save (1, heads, tokens, head_dim)"
        )
    if tensor.dtype not in DTYPES_OF_CARTRIDGES:
        raise InputError(
            f"Layer {layer_idx} of {name} is {tensor.dtype}: "
            f"save one of {', '.join(DTYPES_OF_CARTRIDGES)}"
        )


def _check_tensors(
    trainable: tuple[Sequence[SavedTensor], Sequence[SavedTensor]],
    frozen: tuple[Sequence[SavedTensor], Sequence[SavedTensor]] | None,
) -> None:
    """Compare every tensor with the first key.

    Trained and frozen ones may have unlike numbers of tokens, each the same in all layers.
    """
    first = trainable[0][0]
    for pair in (trainable, frozen or ((), ())):
        for kind, tensors in zip("KV", pair, strict=True):
            for layer_idx, tensor in enumerate(tensors):
                wanted = (1, first.shape[1], pair[0][0].shape[2], first.shape[3])
                if tensor.shape != wanted:
                    raise InputError(
                        f"Layer {layer_idx} {kind} shape {tensor.shape} != layer 0 K shape {wanted}"
                    )
                if tensor.dtype != first.dtype:
                    raise InputError(
                        f"Layer {layer_idx} {kind} dtype {tensor.dtype} != layer 0 K dtype "
                        f"{first.dtype}"
                    )
