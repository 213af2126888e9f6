"""Plants faults in a pool, from outside: below what verifies blocks, or behind it.

Nothing in kvkeep plants faults in itself, so there is no setting that could be left on. Whoever may
write a pool can: this changes the bytes of slots, as a stray writer would (below), and on demand
gives them digests and a header that are right for the wrong bytes (behind). Only for a pool whose
stack was started for this, and only while nobody stores into it or loads from it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from kvkeep.model.ids import CANARY_NAMESPACE, BlockKey
from kvkeep.tiers.pool_inode import FILE_HEADER_BYTES
from kvkeep.tiers.shared_memory import PoolView
from kvkeep.tiers.slot_header import (
    DIGEST_BYTES,
    HEADER_BYTES,
    SlotState,
    pack_header,
    unpack_header,
)
from kvkeep.validate.self_test.faults import Block

_POOL_ID = slice(16, 32)
"""Where a pool file has its id (kvkeep.tiers.shared_memory)."""


@dataclass(frozen=True, slots=True)
class Planted:
    """A slot as it was before."""

    slot: int
    key: BlockKey
    sequence: int
    payload: npt.NDArray[np.uint8]
    head: bytes
    """Header and digests."""


class PlantedPool:
    """A mapped pool in which blocks can be found, spoiled and healed."""

    def __init__(self, view: PoolView) -> None:
        self.view = view
        layout = view.geometry.layout
        self._shape = (layout.num_layers, layout.num_heads, layout.page_bytes)
        self._head_bytes = HEADER_BYTES + DIGEST_BYTES * layout.num_pages
        self._planted: list[Planted] = []

    @staticmethod
    def open(path: str) -> "PlantedPool":
        """Map the pool file of a stack whose engine has come.

        Raises:
            UnavailableError: It is no pool, or another user's.
        """
        with open(path, "rb") as file:
            pool_id = file.read(FILE_HEADER_BYTES)[_POOL_ID]
        return PlantedPool(PoolView.open(path, pool_id))

    def slots(self) -> dict[BlockKey, int]:
        """Every readable block and where it lies."""
        found = {}
        for slot in range(self.view.geometry.num_slots):
            header = unpack_header(self._head(slot))
            if header is None or header.state is not SlotState.READY or header.key is None:
                continue
            if header.key.namespace != CANARY_NAMESPACE:
                found[header.key] = slot
        return found

    def block(self, slot: int) -> Block:
        """A copy of a slot's bytes."""
        return self.view.payload(slot).reshape(self._shape).copy()

    def plant(self, slot: int, block: Block, *, is_sealed: bool, has_digests: bool) -> None:
        """Put wrong bytes into a readable slot.

        Args:
            slot: Of a readable block.
            block: The wrong bytes.
            is_sealed: Behind verification: digests and header are right for the wrong bytes.
            has_digests: Not sealed, but with digests that fit the bytes, as when a whole block of
                another key lies here.
        """
        head = bytes(self._head(slot))
        header = unpack_header(head)
        assert header is not None
        assert header.key is not None
        payload = self.view.payload(slot)
        self._planted.append(Planted(slot, header.key, header.sequence, payload.copy(), head))
        payload[:] = block.reshape(-1)
        if not (is_sealed or has_digests):
            return
        digests = _digests(block)
        self._head(slot)[HEADER_BYTES:] = digests
        if is_sealed:
            self._head(slot)[:HEADER_BYTES] = pack_header(header, digests)

    def heal(self) -> None:
        """Put back what was there, except in slots that hold another block by now."""
        for planted in self._planted:
            header = unpack_header(self._head(planted.slot))
            # A header that does not fit its digests is one that was planted and that nobody used.
            is_same = header is None or (
                (header.key, header.sequence) == (planted.key, planted.sequence)
            )
            if is_same:
                self.view.payload(planted.slot)[:] = planted.payload
                self._head(planted.slot)[:] = planted.head
        self._planted.clear()

    def _head(self, slot: int) -> memoryview:
        start = FILE_HEADER_BYTES + slot * self.view.geometry.header_stride
        return self.view.region[start : start + self._head_bytes]


def _digests(block: Block) -> bytes:
    pages = block.reshape(-1, block.shape[-1])
    return b"".join(xxhash.xxh3_128_digest(page.tobytes()) for page in pages)
