"""How one block of KV lies in memory, and the namespace that follows from it.

A block holds, for every layer and KV head of the model (all tensor-parallel ranks together), one
head page: the bytes exactly as the engine keeps them, or the form of them that the page format
names. In a pool slot the pages lie layer by layer, so that one layer of neighboring heads is one
run of bytes for any tensor-parallel size:

    slot:  | layer 0: head 0, head 1, ... | layer 1: head 0, head 1, ... | ...
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from kvkeep.model.errors import InputError
from kvkeep.model.ids import HASH_BYTES, Namespace
from kvkeep.model.tenant import TAG_BYTES, tag_of

NUM_PAGES_MAX = 1 << 16
PAGE_BYTES_MAX = 1 << 24


TEXT_MAX = 80
"""Of a field's value, as much as a message shows."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Geometry of a block, all ranks together. Equal layouts can share one pool."""

    num_layers: int
    """Attention layers that keep KV of their own; at least 1."""
    num_heads: int
    """KV heads of the whole model, not of one rank; at least 1."""
    page_bytes: int
    """Bytes of one head page."""
    block_tokens: int
    """Tokens per block."""
    dtype: str
    """Element type of the engine's cache, as torch names it without the prefix: ``bfloat16``."""
    page_format: str
    """Order of bytes inside a head page: attention backend family, layout and instruction set, and
    the form of the pages unless they are stored as they are.

    The CPU build packs K transposed, and differently with AMX (vllm 0.32,
    v1/attention/backends/cpu_attn.py), so pages never cross formats.
    """

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "page_bytes", "block_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1. {name}={getattr(self, name)}")
        if self.num_pages > NUM_PAGES_MAX or self.page_bytes > PAGE_BYTES_MAX:
            raise InputError(f"layout out of range. pages={self.num_pages} page={self.page_bytes}")

    @property
    def num_pages(self) -> int:
        """Head pages in a block."""
        return self.num_layers * self.num_heads

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all ranks and layers."""
        return self.num_pages * self.page_bytes

    def difference(self, other: "KvLayout") -> str:
        """Name the fields that differ, for a person; empty if the layouts are equal."""
        mine, theirs = asdict(self), asdict(other)
        return ", ".join(
            f"{name} {_short(mine[name])}, not {_short(theirs[name])}"
            for name in mine
            if mine[name] != theirs[name]
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= TEXT_MAX else f"{text[:TEXT_MAX]}..."


def derive_namespace(layout: KvLayout, identity: Mapping[str, str], tenant: str = "") -> Namespace:
    """Digest of the layout and of what else decides a block's bytes, and whose it is.

        | 0 .. 24: digest of layout, identity and tenant | 24 .. 32: the tenant's tag |

    Args:
        layout: Geometry and page format.
        identity: By name: weights' digest, RoPE and attention configuration, KV scales, fingerprint
            of the tenant's secret. Never tensor-parallel size, rank, hash seed or engine id.
        tenant: By its tag a daemon finds the tenant's share of the pool.

    Returns:
        32 bytes, the same for the same values on every host.
    """
    parts = [asdict(layout), dict(identity), tenant]
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    digest = hashlib.blake2b(
        text.encode(), digest_size=HASH_BYTES - TAG_BYTES, person=b"kvkeep ns 2"
    )
    return Namespace(digest.digest() + tag_of(tenant))
