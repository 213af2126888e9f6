"""One node's decisions: events in, effects out.

``NodeState.handle(event, now_s=...)`` is the only entry. It composes the ledger of the pool with
the leases on it, and keeps the three promises that everything else rests on:

* a block is lent for reading only when every head of it was committed;
* a lent block stays where it is until its leases end;
* a slot is reused only after every writer it was ever lent to is proven quiet: it finished, it
  said so in a new session, or its process is dead. A deadline proves nothing about a frozen
  writer, so an overdue slot goes behind a fence instead of back to the free list.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from kvkeep.core import effects as do
from kvkeep.core import events as on
from kvkeep.core.blocks import BlockLedger, BlockState, Move, Slot
from kvkeep.core.eviction.base import EvictionPolicy
from kvkeep.core.leases import LeaseTable, ReadLease, WriteLease
from kvkeep.core.quotas import Account
from kvkeep.model.ids import CANARY_NAMESPACE, UNKNOWN_PID, BlockKey, LeaseId

LEASES_MAX = 1 << 16
"""Read leases at once, and as many for writing; an engine has one of each per request in flight."""

NO_LEASE = LeaseId(0)

TIERS_SESSION = 0
"""The session under which the daemon itself moves blocks to and from lower tiers."""


class NodeState:
    """The pool's ledger and its leases; pure and synchronous.

    Not thread-safe: one thread calls ``handle``.
    """

    def __init__(
        self,
        num_slots: int,
        num_heads: int,
        policy: EvictionPolicy,
        tenants: Sequence[Account] = (),
    ) -> None:
        """Begin with an empty pool; the arguments are those of its ledger."""
        self.ledger = BlockLedger(num_slots, num_heads, policy, tenants)
        self.reads: LeaseTable[ReadLease] = LeaseTable()
        self.writes: LeaseTable[WriteLease] = LeaseTable()
        self._lost: dict[int, dict[LeaseId, WriteLease]] = {}
        """Write leases that ended without proof of quiet, by the writer's pid."""
        self._lost_slots: dict[int, list[Slot]] = {}
        """Slots fenced by a recovery, by the pid of whoever wrote them for an earlier daemon."""
        self._incomplete: dict[int, float] = {}
        """Slots whose writers are done though heads are missing, with their deadline."""
        self._last_lease_id = 0
        self.counters = dict.fromkeys(
            ("blocks_stored", "blocks_promoted", "blocks_lent", "blocks_corrupt", "blocks_evicted",
             "leases_granted", "leases_expired", "stores_fenced", "stores_without_room",
             "lookups", "lookup_blocks"),
            0,
        )  # fmt: skip
        self._table: dict[type, Callable[[Any, float], list[do.Effect]]] = {
            on.ReadAsked: self._read_asked,
            on.ReadAskedAgain: self._read_asked_again,
            on.BlocksAsked: self._blocks_asked,
            on.ReadFinished: self._read_finished,
            on.StoreAsked: self._store_asked,
            on.StoreFinished: self._store_finished,
            on.BlocksFoundCorrupt: self._blocks_found_corrupt,
            on.BlocksDropped: self._blocks_dropped,
            on.HolderLeft: self._holder_left,
            on.HolderQuiet: self._holder_quiet,
            on.BlockRecovered: self._block_recovered,
            on.WriteRecovered: self._write_recovered,
            on.ClearAsked: self._clear_asked,
            on.TimePassed: self._time_passed,
        }

    def handle(self, event: on.Event, *, now_s: float) -> list[do.Effect]:
        """Take in one event and say what to do.

        Args:
            event: What happened.
            now_s: Monotonic time; never less than in the call before.

        Returns:
            Effects, to be carried out in this order before the next event.

        Raises:
            InvariantError: kvkeep contradicts itself; the state can't be trusted any more.
        """
        return self._table[type(event)](event, now_s)

    def _next_lease_id(self) -> LeaseId:
        self._last_lease_id += 1
        self.counters["leases_granted"] += 1
        return LeaseId(self._last_lease_id)

    # ---- reading

    def _read_asked(self, event: on.ReadAsked, _now_s: float) -> list[do.Effect]:
        self.counters["lookups"] += 1
        self.counters["lookup_blocks"] += len(event.hashes)
        return self._lend_prefix(event, 0)

    def _read_asked_again(self, event: on.ReadAskedAgain, _now_s: float) -> list[do.Effect]:
        before = self.reads.find(event.lease_id, event.holder)
        # First the new lease: what the first one keeps in its slot must stay there.
        effects = self._lend_prefix(event, 0 if before is None else len(before.slots))
        if before is not None:
            effects += self._end_reads([replace(before, is_use=False)])
        return effects

    def _lend_prefix(self, event: on.ReadAsked, num_counted: int) -> list[do.Effect]:
        """Lend what is readable; the leading ``num_counted`` blocks are counted as lent already."""
        slots = self.ledger.readable_prefix(event.namespace, event.group_idx, event.hashes)
        if not slots or len(self.reads) >= LEASES_MAX:
            return [do.ReplyRead(event.reply_to, NO_LEASE, (), event.deadline_s)]
        self.ledger.pin(slots)
        lease = ReadLease(self._next_lease_id(), event.holder, slots, event.deadline_s)
        self.reads.add(lease)
        self.counters["blocks_lent"] += max(0, len(slots) - num_counted)
        slot_idxs = [slot.idx for slot in slots]
        return [do.ReplyRead(event.reply_to, lease.lease_id, slot_idxs, event.deadline_s)]

    def _blocks_asked(self, event: on.BlocksAsked, _now_s: float) -> list[do.Effect]:
        found = [self.ledger.find(key) for key in event.keys]
        ready = [s if s is not None and s.state is BlockState.READY else None for s in found]
        slots = [slot for slot in ready if slot is not None]
        slot_idxs = [do.NO_SLOT if slot is None else slot.idx for slot in ready]
        if not slots or len(self.reads) >= LEASES_MAX:
            none = [do.NO_SLOT] * len(ready)
            return [do.ReplyRead(event.reply_to, NO_LEASE, none, event.deadline_s)]
        self.ledger.pin(slots)
        lease = ReadLease(
            self._next_lease_id(), event.holder, slots, event.deadline_s, is_use=False
        )
        self.reads.add(lease)
        return [do.ReplyRead(event.reply_to, lease.lease_id, slot_idxs, event.deadline_s)]

    def _read_finished(self, event: on.ReadFinished, _now_s: float) -> list[do.Effect]:
        found = (self.reads.find(lease_id, event.holder) for lease_id in event.lease_ids)
        return self._end_reads(lease for lease in found if lease is not None)

    def _end_reads(self, leases: Iterable[ReadLease]) -> list[do.Effect]:
        effects: list[do.Effect] = []
        for lease in leases:
            self.reads.end(lease)
            freed = self.ledger.unpin(lease.slots, is_use=lease.is_use)
            effects += [do.MarkFree(slot.idx) for slot in freed]
        return effects

    # ---- storing

    def _store_asked(self, event: on.StoreAsked, _now_s: float) -> list[do.Effect]:
        keys = [BlockKey(event.namespace, h, event.group_idx) for h in event.hashes]
        is_heads = event.head_mask and not event.head_mask & ~self.ledger.all_heads
        if not is_heads or len(self.writes) >= LEASES_MAX:
            slot_idxs = [do.NO_SLOT] * len(keys)
            return [do.ReplyStore(event.reply_to, NO_LEASE, slot_idxs, event.deadline_s)]
        effects = self._make_room(keys)
        granted: list[Slot] = []
        slot_idxs = []
        lease_id = LeaseId(self._last_lease_id + 1)
        for key in keys:
            known = self.ledger.find(key)
            slot = self._writable(key, known, event.head_mask)
            slot_idxs.append(do.NO_SLOT if slot is None else slot.idx)
            if slot is None:
                continue
            granted.append(slot)
            pid = event.holder.pid
            if slot.num_writers > 1 and slot.writer_pid != pid:
                pid = UNKNOWN_PID  # one pid can't tell a recovery to wait for two processes
            if known is None or slot.writer_pid != pid:
                slot.writer_pid = pid
                effects.append(do.MarkWriting(slot.idx, key, lease_id, pid))
        if not granted:
            return [*effects, do.ReplyStore(event.reply_to, NO_LEASE, slot_idxs, event.deadline_s)]
        lease = WriteLease(
            self._next_lease_id(), event.holder, granted, event.head_mask, event.deadline_s
        )
        self.writes.add(lease)
        return [
            *effects,
            do.ReplyStore(event.reply_to, lease.lease_id, slot_idxs, event.deadline_s),
        ]

    def _make_room(self, keys: list[BlockKey]) -> list[do.Effect]:
        """Evict for the blocks without a slot, but never stored ones of the same sequence."""
        found = [self.ledger.find(key) for key in dict.fromkeys(keys)]
        num_missing = found.count(None) - self.ledger.num_free
        if num_missing <= 0:
            return []
        stored = [slot for slot in found if slot is not None and slot.state is BlockState.READY]
        self.ledger.pin(stored)
        evicted = self.ledger.evict(num_missing, keys[0].namespace)
        self.ledger.unpin(stored)
        self.counters["blocks_evicted"] = self.ledger.num_evicted
        return [do.MarkFree(slot.idx) for slot in evicted]

    def _writable(self, key: BlockKey, slot: Slot | None, head_mask: int) -> Slot | None:
        """The slot in which these heads of the block may be written, if any."""
        if slot is None:
            slot = self.ledger.begin_write(key)
            if slot is None:
                self.counters["stores_without_room"] += 1
                return None
        wanted = slot.missing_heads & ~slot.writing_heads
        if slot.state is not BlockState.WRITING or head_mask & ~wanted:
            return None
        slot.writing_heads |= head_mask
        slot.num_writers += 1
        self._incomplete.pop(slot.idx, None)
        return slot

    def _store_finished(self, event: on.StoreFinished, _now_s: float) -> list[do.Effect]:
        lease = self.writes.find(event.lease_id, event.holder)
        if lease is None:
            self.counters["stores_fenced"] += 1
            effects = self._late_writer_quiet(event)
            return [*effects, do.ReplyStored(event.reply_to, 0, is_fenced=True)]
        self.writes.end(lease)
        effects = []
        num_ready = 0
        stored = list(event.is_stored) if len(event.is_stored) == len(lease.slots) else []
        # From the last to the first, so that of one prefix the tail is evicted before the head.
        for idx, slot in reversed(list(enumerate(lease.slots))):
            is_stored = bool(stored) and stored[idx]
            effects += self._writer_done(slot, lease, is_stored=is_stored)
            if is_stored and slot.state is BlockState.READY and slot.key is not None:
                num_ready += 1
                effects.append(do.MarkReady(slot.idx, slot.key))
        is_engine = event.holder.session_id != TIERS_SESSION
        self.counters["blocks_stored" if is_engine else "blocks_promoted"] += num_ready
        return [*effects, do.ReplyStored(event.reply_to, num_ready, is_fenced=False)]

    def _writer_done(self, slot: Slot, lease: WriteLease, *, is_stored: bool) -> list[do.Effect]:
        """Take one quiet writer off a slot."""
        slot.num_writers -= 1
        slot.writing_heads &= ~lease.head_mask
        if slot.state is BlockState.WRITING:
            if is_stored and self.ledger.finish_heads(slot, lease.head_mask):
                return []
            if slot.num_writers == 0 and not is_stored:
                self.ledger.fail_write(slot)
                return [do.MarkFree(slot.idx)]
            if slot.num_writers == 0:
                # Other ranks bring the missing heads under leases of their own.
                self._incomplete[slot.idx] = lease.deadline_s
        elif slot.state is BlockState.FENCED and slot.num_writers == 0:
            self.ledger.unfence(slot)
            return [do.MarkFree(slot.idx)]
        return []

    def _lose(self, leases: Iterable[WriteLease]) -> list[do.Effect]:
        """Fence what these writers may still be writing, until they are proven quiet."""
        effects: list[do.Effect] = []
        for lease in leases:
            self.writes.end(lease)
            self._lost.setdefault(lease.holder.pid, {})[lease.lease_id] = lease
            for slot in lease.slots:
                if slot.state is BlockState.WRITING:
                    self.ledger.fence(slot)
            effects.append(do.WatchProcess(lease.holder.pid))
        return effects

    def _late_writer_quiet(self, event: on.StoreFinished) -> list[do.Effect]:
        """A lost writer reports after all: its data is refused, its slots are free."""
        lease = self._lost.get(event.holder.pid, {}).get(event.lease_id)
        if lease is None or lease.holder != event.holder:
            return []
        self._found(lease)
        return self._quiet(lease)

    def _found(self, lease: WriteLease) -> None:
        """Forget a lost lease."""
        leases = self._lost[lease.holder.pid]
        del leases[lease.lease_id]
        if not leases:
            del self._lost[lease.holder.pid]

    def _quiet(self, lease: WriteLease) -> list[do.Effect]:
        effects: list[do.Effect] = []
        for slot in lease.slots:
            effects += self._writer_done(slot, lease, is_stored=False)
        return effects

    # ---- holders

    def _holder_left(self, event: on.HolderLeft, _now_s: float) -> list[do.Effect]:
        # A reader that reads on reads at its own risk: it compares digests taken before its copy.
        effects = self._end_reads(self.reads.of_session(event.holder))
        return effects + self._lose(self.writes.of_session(event.holder))

    def _holder_quiet(self, event: on.HolderQuiet, _now_s: float) -> list[do.Effect]:
        if event.pid == UNKNOWN_PID:
            return []
        before = float("inf") if event.before_session is None else event.before_session

        def is_meant(lease: WriteLease) -> bool:
            session = lease.holder.session_id
            return session < before and (event.sessions is None or session in event.sessions)

        mine = [lease for lease in self.writes if lease.holder.pid == event.pid]
        running = [lease for lease in mine if is_meant(lease)]
        over = [lease for lease in self._lost.get(event.pid, {}).values() if is_meant(lease)]
        effects: list[do.Effect] = []
        for lease in running:
            self.writes.end(lease)
        for lease in over:
            self._found(lease)
        for lease in [*running, *over]:
            effects += self._quiet(lease)
        # Who wrote for an earlier daemon is known by the process alone.
        recovered = self._lost_slots.pop(event.pid, []) if event.sessions is None else []
        for slot in recovered:
            slot.num_writers -= 1
            if slot.num_writers == 0:
                self.ledger.unfence(slot)
                effects.append(do.MarkFree(slot.idx))
        return effects

    # ---- recovery, corruption, clearing, time

    def _block_recovered(self, event: on.BlockRecovered, _now_s: float) -> list[do.Effect]:
        if self.ledger.recover(event.key, event.slot):
            return []
        return [do.MarkFree(event.slot)]

    def _write_recovered(self, event: on.WriteRecovered, _now_s: float) -> list[do.Effect]:
        slot = self.ledger.slots[event.slot]
        if slot.state is not BlockState.FENCED:
            self.ledger.recover_writing(event.slot)
        slot.num_writers += 1
        self._lost_slots.setdefault(event.pid, []).append(slot)
        return [do.WatchProcess(event.pid)]

    def _doom(self, slots: Iterable[Slot]) -> list[do.Effect]:
        effects: list[do.Effect] = []
        for slot in slots:
            idx = slot.idx
            # The header goes first in both cases: no restart may bring the block back.
            self.ledger.doom(slot)
            effects.append(do.MarkFree(idx))
        return effects

    def _ready_of(self, event: on.BlocksFoundCorrupt | on.BlocksDropped) -> list[Slot]:
        hashes = dict.fromkeys(event.hashes)
        found = [self.ledger.find(BlockKey(event.namespace, h, event.group_idx)) for h in hashes]
        return [slot for slot in found if slot is not None and slot.state is BlockState.READY]

    def _blocks_found_corrupt(self, event: on.BlocksFoundCorrupt, _now_s: float) -> list[do.Effect]:
        bad = self._ready_of(event)
        self.counters["blocks_corrupt"] += len(bad)
        return self._doom(bad)

    def _blocks_dropped(self, event: on.BlocksDropped, _now_s: float) -> list[do.Effect]:
        return self._doom(self._ready_of(event))

    def _clear_asked(self, event: on.ClearAsked, _now_s: float) -> list[do.Effect]:
        ready = self.ledger.ready_slots()
        # A canary's slot is its worker's until the session ends; nobody can ask for what is there.
        writing = [
            slot
            for slot in self.ledger.writing_slots()
            if slot.key is None or slot.key.namespace != CANARY_NAMESPACE
        ]
        num_lent = sum(1 for slot in ready if slot.num_pins)
        effects = self._doom(ready)
        for slot in writing:
            if slot.num_writers:
                # The header stays: whoever recovers it has to wait for the writer as well.
                self.ledger.fence(slot, Move.DOOMED)
            else:
                effects += self._give_up(slot)
        num_kept = num_lent + sum(1 for slot in writing if slot.num_writers)
        return [*effects, do.ReplyCleared(event.reply_to, len(ready) - num_lent, num_kept)]

    def _time_passed(self, _event: on.TimePassed, now_s: float) -> list[do.Effect]:
        late_reads, late_writes = self.reads.expired(now_s), self.writes.expired(now_s)
        self.counters["leases_expired"] += len(late_reads) + len(late_writes)
        effects = self._end_reads(late_reads) + self._lose(late_writes)
        for idx in [idx for idx, deadline_s in self._incomplete.items() if deadline_s <= now_s]:
            effects += self._give_up(self.ledger.slots[idx])
        return effects

    def _give_up(self, slot: Slot) -> list[do.Effect]:
        """Free an incomplete slot that nobody writes any more."""
        del self._incomplete[slot.idx]
        self.ledger.fail_write(slot)
        return [do.MarkFree(slot.idx)]

    def check(self) -> None:
        """Assert every invariant of the node; O(slots), for tests and after a recovery."""
        self.ledger.check()
        pins = dict.fromkeys((slot.idx for slot in self.ledger.slots), 0)
        writers = dict(pins)
        for read in self.reads:
            for slot in read.slots:
                pins[slot.idx] += 1
        lost = (lease for leases in self._lost.values() for lease in leases.values())
        for write in [*self.writes, *lost]:
            for slot in write.slots:
                writers[slot.idx] += 1
        for lost_slots in self._lost_slots.values():
            for slot in lost_slots:
                writers[slot.idx] += 1
        for slot in self.ledger.slots:
            assert slot.num_pins == pins[slot.idx], f"pins and leases differ. slot={slot.idx}"
            assert slot.num_writers == writers[slot.idx], f"writers differ. slot={slot.idx}"
            # Whatever is not FREE or READY has someone, or a deadline, that ends it.
            is_abandoned = slot.state is BlockState.WRITING and not slot.num_writers
            assert is_abandoned == (slot.idx in self._incomplete), f"no end. slot={slot.idx}"
            assert slot.num_writers or slot.state is not BlockState.FENCED, f"slot={slot.idx}"
