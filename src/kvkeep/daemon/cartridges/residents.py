"""Cartridges in the pool: absent, loaded, in use or pinned.

Their blocks are blocks like others, so leases keep them while engines read, and what nobody reads
goes in the order of use when room is needed. A pin is a lease of the daemon's own that does not
end. What is known here is bookkeeping over the ledger and lost with the daemon; engines tell it
anew when they meet the next one, which has recovered the blocks.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from kvkeep.core import effects as do
from kvkeep.core import events as on
from kvkeep.core.blocks import BlockState, Slot
from kvkeep.core.node import TIERS_SESSION
from kvkeep.daemon.shell import Shell
from kvkeep.model.errors import InputError, RefusedError
from kvkeep.model.ids import UNKNOWN_PID, BlockHash, BlockKey, Holder, LeaseId, Namespace

log = logging.getLogger(__name__)

RESIDENTS_MAX = 4096
"""Lists of blocks that are remembered; beyond it the one told longest ago is forgotten."""
PINNED_SHARE_MAX = 0.5
"""Of the pool, that pins may keep from everybody else."""
FOREVER_S = float("inf")


@dataclass(slots=True)
class Resident:
    """One cartridge under the names of one kind of engine."""

    cartridge_id: str
    digest: str
    namespace: Namespace
    group_idx: int
    hashes: Sequence[BlockHash]
    pin: LeaseId | None = None
    """The daemon's own lease on all of its blocks."""


class Residents:
    """Every cartridge that engines have told of. On the event loop's thread."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._holder = Holder(TIERS_SESSION, UNKNOWN_PID)
        self._residents: dict[tuple[Namespace, int, BlockHash], Resident] = {}
        self.num_pins_refused = 0
        """Pins for which the pool had no room."""

    def keep(self, told: Resident, *, is_pinned: bool) -> None:
        """An engine says which blocks are a cartridge's, and whether they are to stay."""
        if not told.hashes:
            return
        key = (told.namespace, told.group_idx, told.hashes[-1])
        known = self._residents.pop(key, told)
        self._unpin(known)
        self._residents[key] = told
        if is_pinned:
            self._pin(told)
        while len(self._residents) > RESIDENTS_MAX:
            oldest = next(iter(self._residents))
            self._unpin(self._residents.pop(oldest))

    def _pin(self, resident: Resident) -> None:
        node = self._shell.node
        if node is None:
            return
        num_pinned = sum(len(each.hashes) for each in self._residents.values() if each.pin)
        if num_pinned + len(resident.hashes) > PINNED_SHARE_MAX * len(node.ledger.slots):
            self.num_pins_refused += 1
            log.warning(
                "cartridge %s is not pinned: %d blocks and %d pinned already are more than half "
                "of the pool: raise pool_bytes",
                resident.cartridge_id, len(resident.hashes), num_pinned,
            )  # fmt: skip
            return
        reply = self._shell.handle(
            on.ReadAsked(
                0, self._holder, resident.namespace, resident.group_idx, resident.hashes, FOREVER_S
            )
        )
        if not isinstance(reply, do.ReplyRead) or not reply.lease_id:
            return
        if len(reply.slots) < len(resident.hashes):
            # Not all of it is there any more: half a pin would keep what is of no use alone.
            self._shell.handle(on.ReadFinished(self._holder, [reply.lease_id]))
            return
        resident.pin = reply.lease_id

    def _unpin(self, resident: Resident) -> None:
        if resident.pin is not None:
            self._shell.handle(on.ReadFinished(self._holder, [resident.pin]))
            resident.pin = None

    def drop(self, cartridge_id: str, *, is_forced: bool = False) -> int:
        """Forget a cartridge's blocks; those that engines are reading go when they are done.

        Returns:
            Blocks that were in the pool.

        Raises:
            InputError: Nobody has told of such a cartridge.
            RefusedError: It is in use or pinned, and ``is_forced`` is not set; nothing is changed.
        """
        found = {k: r for k, r in self._residents.items() if r.cartridge_id == cartridge_id}
        if not found:
            raise InputError(
                f"no engine has brought cartridge {cartridge_id!r} to this pool: see kvkeep status"
            )
        states = {self._state_of(each) for each in found.values()}
        if not is_forced and states & {"in use", "pinned"}:
            what = "pinned" if "pinned" in states else "in use"
            raise RefusedError(
                f"cartridge {cartridge_id} is {what}: wait or unpin it, or force its eviction"
            )
        num_blocks = 0
        for key, each in found.items():
            self._unpin(each)
            num_blocks += len(self._ready(each))
            self._shell.handle(on.BlocksDropped(each.namespace, each.group_idx, each.hashes))
            del self._residents[key]
        return num_blocks

    # ---- questions

    def _ready(self, resident: Resident) -> list[Slot]:
        node = self._shell.node
        if node is None:
            return []
        keys = (
            BlockKey(resident.namespace, block_hash, resident.group_idx)
            for block_hash in resident.hashes
        )
        found = (node.ledger.find(key) for key in keys)
        return [s for s in found if s is not None and s.state is BlockState.READY]

    def _state_of(self, resident: Resident) -> str:
        ready = self._ready(resident)
        own = 0 if resident.pin is None else 1
        if any(slot.num_pins > own for slot in ready):
            return "in use"
        if resident.pin is not None:
            return "pinned"
        return "loaded" if len(ready) == len(resident.hashes) else "absent"

    def describe(self) -> list[dict[str, object]]:
        """Each cartridge and how it stands, for people and routers."""
        geometry = self._shell.pool.geometry
        block_bytes = 0 if geometry is None else geometry.layout.block_bytes
        told = []
        for each in self._residents.values():
            num_ready = len(self._ready(each))
            told.append(
                {
                    "cartridge_id": each.cartridge_id,
                    "digest": each.digest,
                    "namespace": each.namespace.hex(),
                    "state": self._state_of(each),
                    "is_pinned": each.pin is not None,
                    "blocks": len(each.hashes),
                    "blocks_resident": num_ready,
                    "bytes_resident": num_ready * block_bytes,
                }
            )
        return told

    def cleared(self) -> None:
        """The pool was emptied on request: nothing is kept, and nothing known."""
        for each in self._residents.values():
            self._unpin(each)
        self._residents.clear()
