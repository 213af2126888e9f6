"""Layers of a sequence as tensors: ``layers.0.key`` and ``layers.0.value``, and so on.

Each is ``[tokens, heads, dim]``, the canonical order, whatever engine or tool it came from.
"""

import re
from collections.abc import Iterable, Sequence

from kvkeep.model.errors import InputError
from kvkeep.protocol.tensors import TensorPlace

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,255}")
"""What a sequence may be called."""
LAYERS_MAX = 512
DIGEST_HEADER = "X-Kvkeep-Digest"
"""Field of a request or answer: XXH3-128 of the body, in hexadecimal digits. Against accidents on
the way, which the network's own sums miss once in a while."""
_TENSOR = re.compile(r"layers\.(0|[1-9][0-9]{0,3})\.(key|value)")
KEY, VALUE = "key", "value"


def check_name(name: str) -> None:
    """Refuse what can't be a sequence's name.

    Raises:
        InputError: It is too long, empty, or has other characters.
    """
    if not NAME.fullmatch(name):
        raise InputError(
            "a sequence's name has 1 to 256 letters, digits, dots, colons, dashes, underscores "
            "and @, and begins with a letter or digit"
        )


def tensor_name(layer_idx: int, part: str) -> str:
    """What the keys or values of a layer are called in a body.

    Raises:
        InputError: There is no such layer.
    """
    if not 0 <= layer_idx < LAYERS_MAX:
        raise InputError(f"layer {layer_idx} is not taken: layers go from 0 to {LAYERS_MAX - 1}")
    return f"layers.{layer_idx}.{part}"


def pair_layers(places: Iterable[TensorPlace]) -> dict[int, tuple[TensorPlace, TensorPlace]]:
    """Keys and values of each layer of a body, by layer.

    Raises:
        InputError: A tensor is none of those, has another shape, or lacks its other half.
    """
    found: dict[int, dict[str, TensorPlace]] = {}
    for place in places:
        match = _TENSOR.fullmatch(place.name)
        layer_idx = LAYERS_MAX if match is None else int(match[1])
        if match is None or layer_idx >= LAYERS_MAX:
            raise InputError(
                f"the tensor {place.name[:80]!r} is none of a sequence: call them "
                f"layers.0.key and layers.0.value, up to layers.{LAYERS_MAX - 1}.value"
            )
        if len(place.shape) != 3 or 0 in place.shape:
            raise InputError(
                f"the tensor {place.name} has the shape {list(place.shape)}: send "
                "[tokens, heads, dim], none of them 0"
            )
        found.setdefault(layer_idx, {})[match[2]] = place
    layers = {}
    for layer_idx, parts in sorted(found.items()):
        if len(parts) != 2 or parts[KEY].shape[0] != parts[VALUE].shape[0]:
            raise InputError(f"layer {layer_idx} needs a key and a value of as many tokens")
        layers[layer_idx] = (parts[KEY], parts[VALUE])
    return layers


def parse_layers(text: str) -> Sequence[int]:
    """A list such as ``0,3,4`` as numbers of layers.

    Raises:
        InputError: It is none.
    """
    if not re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4}){0,511}", text):
        raise InputError("layers must be a list of numbers such as 0,3,4")
    return sorted({int(number) for number in text.split(",")})
