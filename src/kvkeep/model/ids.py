"""One type for each kind of identity."""

from dataclasses import dataclass
from typing import NewType

BlockHash = NewType("BlockHash", bytes)
"""Keyed digest of a block's tokens and of all before them (model/hashing.py)."""

Namespace = NewType("Namespace", bytes)
"""Digest of everything but tokens that decides a block's bytes: ``HASH_BYTES`` bytes."""

EngineId = NewType("EngineId", str)
"""One engine process for as long as it lives; never part of a block's identity."""

LeaseId = NewType("LeaseId", int)
"""A lease of this daemon's generation; 1 and up, never reused within it."""

HASH_BYTES = 32
"""Width of a block hash and of a namespace, in bytes."""

CANARY_NAMESPACE = Namespace(bytes(HASH_BYTES))
"""Of the blocks with which workers prove their path to the pool; no tenant's tag is all zeros."""

UNKNOWN_PID = 0
"""Instead of a process id: nobody knows which process, or there were several."""


@dataclass(frozen=True, slots=True)
class BlockKey:
    """The full identity of a stored block; two blocks with equal keys hold equal bytes."""

    namespace: Namespace
    """Model, dtype, page format, tenant; see ``model/layout.py``."""
    block_hash: BlockHash
    """Tokens up to and including this block."""
    group_idx: int = 0
    """KV cache group, 0-based, at most 65535."""

    def __post_init__(self) -> None:
        if len(self.namespace) != HASH_BYTES or len(self.block_hash) != HASH_BYTES:
            raise ValueError(f"a namespace and a block hash have {HASH_BYTES} bytes each")
        if not 0 <= self.group_idx <= 0xFFFF:
            raise ValueError(f"group_idx out of range. group_idx={self.group_idx}")

    def __str__(self) -> str:
        return f"{self.namespace[:4].hex()}/{self.block_hash[:8].hex()}/{self.group_idx}"


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease: one session of one process."""

    session_id: int
    """Connection, counted by the daemon; never reused within a generation."""
    pid: int
    """Process at the other end, from the socket's peer credentials; may be ``UNKNOWN_PID``."""
