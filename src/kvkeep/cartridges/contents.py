"""The KV of a cartridge in memory: canonical keys and values of every layer, checked.

Keys and values are ``[tokens, heads, dim]`` per layer, all heads of the model, keys rotated for
the positions 0, 1, ...: what an engine's own layer would have written, before any page format.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvkeep.cartridges.manifest import DTYPES_OF_CARTRIDGES
from kvkeep.client.sequence_tensors import Tensor, as_tensor
from kvkeep.model.errors import InputError
from kvkeep.protocol.sequence_body import LAYERS_MAX

TOKEN_ID_MAX = (1 << 31) - 1
_EXPONENT = {"float32": 0x7F80_0000, "float16": 0x7C00, "bfloat16": 0x7F80}
"""Bits of the exponent; all set in infinities and NaNs, and in nothing else (IEEE 754)."""


@dataclass(frozen=True, eq=False)
class Contents:
    """KV that fits together: as many tokens, heads and elements everywhere, one dtype."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    """Keys and values, ``[tokens, heads, dim]``."""
    num_frozen_tokens: int = 0
    """Leading tokens that training left as they were."""
    token_ids: npt.NDArray[np.int32] | None = None
    """Ids of its tokens, int32 ``[tokens]``; None for one that was trained."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.layers) < LAYERS_MAX:
            raise InputError(
                f"a cartridge has 1 to {LAYERS_MAX - 1} layers, not {len(self.layers)}"
            )
        first = self.layers[0][0]
        for layer_idx, layer in enumerate(self.layers):
            for kind, tensor in zip("KV", layer, strict=True):
                _check_alike(first, tensor, layer_idx, kind)
        if 0 in first.shape:
            raise InputError(f"the cartridge is empty: its layers have the shape {first.shape}")
        if not 0 <= self.num_frozen_tokens <= first.shape[0]:
            raise InputError(
                f"{self.num_frozen_tokens} frozen tokens don't fit {first.shape[0]} tokens"
            )
        if self.token_ids is not None and self.token_ids.shape != (first.shape[0],):
            raise InputError(
                f"{self.token_ids.size} token ids don't go with {first.shape[0]} tokens: "
                "give one for each"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV it holds."""
        return self.layers[0][0].shape[0]

    @property
    def dtype(self) -> str:
        """Of every tensor."""
        return self.layers[0][0].dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """Tokens, heads and elements of every tensor."""
        return self.layers[0][0].shape


def make_contents(
    layers: Sequence[tuple[object, object]],
    *,
    num_frozen_tokens: int = 0,
    token_ids: Sequence[int] | None = None,
) -> Contents:
    """Take KV as a caller has it: tensors of torch on the CPU, arrays, buffers.

    Args:
        layers: Keys and values, ``[tokens, heads, dim]``.
        num_frozen_tokens: Leading tokens that training left as they were.
        token_ids: Ids of the tokens, each 0 to 2**31 - 1.

    Raises:
        InputError: It does not fit together, or holds NaN or infinities.
    """
    pairs = tuple((as_tensor(key), as_tensor(value)) for key, value in layers)
    ids = None
    if token_ids is not None:
        if any(not 0 <= token_id <= TOKEN_ID_MAX for token_id in token_ids):
            raise InputError(f"a token id is not between 0 and {TOKEN_ID_MAX}: mend it")
        ids = np.asarray(token_ids, dtype=np.int32)
    contents = Contents(pairs, num_frozen_tokens, ids)
    for layer_idx, layer in enumerate(pairs):
        for kind, tensor in zip("KV", layer, strict=True):
            if not is_finite(tensor):
                raise InputError(f"Layer {layer_idx} {kind} holds NaN or Inf: build it anew")
    return contents


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    mask = _EXPONENT[tensor.dtype]
    return not bool(((tensor.bits() & mask) == mask).any())


def _check_alike(first: Tensor, tensor: Tensor, layer_idx: int, kind: str) -> None:
    if tensor.dtype not in DTYPES_OF_CARTRIDGES:
        raise InputError(
            f"Layer {layer_idx} {kind} is {tensor.dtype}: "
            f"a cartridge has one of {', '.join(DTYPES_OF_CARTRIDGES)}"
        )
    if tensor.shape != first.shape:
        raise InputError(
            f"Layer {layer_idx} {kind} shape {tensor.shape} != layer 0 K shape {first.shape}"
        )
    if tensor.dtype != first.dtype:
        raise InputError(
            f"Layer {layer_idx} {kind} dtype {tensor.dtype} != layer 0 K dtype {first.dtype}"
        )
