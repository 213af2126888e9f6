"""Small cartridges for tests: any shape, bits from a seed, written within a millisecond."""

from pathlib import Path
from typing import Any

import numpy as np

from kvkeep.cartridges.contents import Contents, make_contents
from kvkeep.cartridges.file_format import Head, read_head, write_cartridge
from kvkeep.cartridges.manifest import Draft, Manifest
from kvkeep.cartridges.signing import SigningKey
from kvkeep.client.sequence_tensors import Tensor, as_tensor
from kvkeep.protocol.tensors import DTYPES

SHAPE = (6, 2, 4)
"""Tokens, heads and elements."""
CREATED = "2026-01-31T12:00:00Z"
_BITS: dict[int, Any] = {2: np.uint16, 4: np.uint32}
_TOP_BIT_OF_EXPONENT = {"float32": 0x4000_0000, "float16": 0x4000, "bfloat16": 0x4000}


def finite_tensor(seed: int, dtype: str = "float32", shape: tuple[int, int, int] = SHAPE) -> Tensor:
    """Any bits but those of NaNs and infinities."""
    kind = _BITS[DTYPES[dtype][1]]
    bits = np.random.default_rng(seed).integers(0, np.iinfo(kind).max, shape, kind, endpoint=True)
    return as_tensor(bits & ~kind(_TOP_BIT_OF_EXPONENT[dtype]), dtype)


def contents(
    num_layers: int = 2,
    *,
    seed: int = 7,
    dtype: str = "float32",
    shape: tuple[int, int, int] = SHAPE,
    **more: Any,
) -> Contents:
    """KV of so many layers."""
    tensors = [finite_tensor(seed + idx, dtype, shape) for idx in range(2 * num_layers)]
    return make_contents(list(zip(tensors[::2], tensors[1::2], strict=True)), **more)


def small_manifest(
    num_tokens: int,
    block_tokens: int,
    cartridge_id: str = "ships",
    *,
    has_token_ids: bool = True,
) -> Manifest:
    """Of one layer of two heads of four float32; there is no file of it."""
    num_blocks = num_tokens // block_tokens
    per_token = 2 * 2 * 4 * 4
    return Manifest(
        cartridge_id=cartridge_id,
        model="tiny",
        num_layers=1,
        num_heads=2,
        head_dim=4,
        dtype="float32",
        num_tokens=num_tokens,
        num_aligned_tokens=num_blocks * block_tokens,
        block_tokens=block_tokens,
        num_blocks=num_blocks,
        has_token_ids=has_token_ids,
        sha256="0" * 64,
        num_bytes=num_tokens * (per_token + (4 if has_token_ids else 0)),
        created=CREATED,
    )


def draft(cartridge_id: str = "ships", **more: Any) -> Draft:
    """What a maker says."""
    told = {"model": "tiny", "block_tokens": 4, "created": CREATED, **more}
    return Draft(cartridge_id=cartridge_id, **told)


def written(
    folder: Path,
    cartridge_id: str = "ships",
    *,
    kv: Contents | None = None,
    signing_key: SigningKey | None = None,
    **more: Any,
) -> tuple[Path, Head]:
    """A cartridge's file, and what it says."""
    path = folder / f"{cartridge_id}.safetensors"
    write_cartridge(path, draft(cartridge_id, **more), kv or contents(), signing_key)
    return path, read_head(path)
