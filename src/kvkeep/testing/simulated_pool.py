"""The pool's memory as a simulation sees it, and the auditor who knows every true byte.

A head page is two halves, so that a copy can be caught half way. Whoever copies does it in steps,
and anything may happen between two of them.
"""

import functools
import hashlib
from dataclasses import dataclass, field

from kvkeep.core import effects as do
from kvkeep.model.ids import UNKNOWN_PID, BlockKey, LeaseId
from kvkeep.tiers.slot_header import SlotState

HALVES = 2


class SafetyError(AssertionError):
    """A promise was broken."""


@functools.cache
def true_half(key: BlockKey, head_idx: int, half_idx: int) -> bytes:
    """What half a head page of this block holds, 8 bytes."""
    data = b"%s %d %d %d" % (key.block_hash, key.group_idx, head_idx, half_idx)
    return hashlib.blake2b(data, digest_size=8).digest()


def digest_of(halves: list[bytes]) -> bytes:
    """Digest of a head page, 8 bytes."""
    return hashlib.blake2b(b"".join(halves), digest_size=8, person=b"digest").digest()


@dataclass
class SimulatedSlot:
    """One slot: its header, which only the daemon writes, its pages, and their digests."""

    num_heads: int
    state: SlotState = SlotState.FREE
    key: BlockKey | None = None
    pid: int = UNKNOWN_PID
    is_rotten: bool = False
    """Whether a fault changed its bytes since it became ready."""
    pages: list[list[bytes]] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pages = [[b""] * HALVES for _ in range(self.num_heads)]
        self.digests = [b""] * self.num_heads

    @property
    def is_intact(self) -> bool:
        """Whether every page matches its digest, as a recovery finds it."""
        pairs = zip(self.pages, self.digests, strict=True)
        return all(digest_of(page) == digest for page, digest in pairs)

    def holds(self, key: BlockKey) -> bool:
        """Whether every page holds the true bytes of this block."""
        return all(
            half == true_half(key, head_idx, half_idx)
            for head_idx, page in enumerate(self.pages)
            for half_idx, half in enumerate(page)
        )


class Auditor:
    """Watches the memory and the leases, and stops the run at the first broken promise."""

    def __init__(self, slots: list[SimulatedSlot]) -> None:
        self.slots = slots
        self.lent: dict[LeaseId, list[tuple[int, BlockKey]]] = {}
        """Blocks under each read lease that the daemon stands for."""
        self.num_read = 0
        self.num_refused = 0
        """Pages a reader saved itself from by comparing digests."""

    def granted(self, reply: do.ReplyRead, keys: list[BlockKey]) -> None:
        """Note a read lease."""
        if reply.lease_id:
            self.lent[reply.lease_id] = list(zip(reply.slots, keys, strict=False))

    def ended(self, running: set[LeaseId]) -> None:
        """Forget the leases that do not run any more."""
        self.lent = {id_: lent for id_, lent in self.lent.items() if id_ in running}

    def check_lent(self) -> None:
        """No block under a lease has moved or changed."""
        for lease_id, blocks in self.lent.items():
            for slot_idx, key in blocks:
                slot = self.slots[slot_idx]
                if not slot.is_rotten and not slot.holds(key):
                    raise SafetyError(f"a lent block is gone. lease={lease_id} slot={slot_idx}")

    def check_write(self, slot_idx: int, key: BlockKey) -> None:
        """Whoever writes, even too late, writes where its block is still expected."""
        slot = self.slots[slot_idx]
        if slot.state is not SlotState.WRITING or slot.key != key:
            raise SafetyError(
                f"a write landed in another block's slot. slot={slot_idx} written={key} "
                f"state={slot.state.name} key={slot.key}"
            )

    def check_read(
        self, key: BlockKey, head_idx: int, halves: list[bytes], captured_digest: bytes
    ) -> bool:
        """Take a page that a reader copied; whether the reader may use it."""
        if digest_of(halves) != captured_digest:
            self.num_refused += 1
            return False
        if halves != [true_half(key, head_idx, half_idx) for half_idx in range(HALVES)]:
            raise SafetyError(f"wrong bytes passed for right ones. key={key} head={head_idx}")
        self.num_read += 1
        return True

    def check_refusal(self, lease_id: LeaseId, slot_idx: int) -> None:
        """A page under a lease that still runs is only refused if a fault changed it."""
        if lease_id in self.lent and not self.slots[slot_idx].is_rotten:
            raise SafetyError(f"a lent block can't be read. lease={lease_id} slot={slot_idx}")
