"""NodeState against a naive model: any sequence of events, and both agree after each."""

from collections.abc import Callable, Iterable

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvkeep.core import effects as do
from kvkeep.core import events as on
from kvkeep.core.blocks import BlockLedger, Slot
from kvkeep.core.eviction.lru import LruPolicy
from kvkeep.core.leases import WriteLease
from kvkeep.core.node import NodeState
from kvkeep.model.errors import InvariantError
from kvkeep.model.ids import UNKNOWN_PID, BlockHash, BlockKey, Holder, LeaseId, Namespace
from kvkeep.testing.naive_node import Cell, Lease, NaiveNode

NUM_SLOTS = 3
NUM_HEADS = 2
ALL_HEADS = frozenset(range(NUM_HEADS))
NAMESPACE = Namespace(b"n" * 32)
HASHES = [BlockHash(bytes([idx]) * 32) for idx in range(6)]
DOCUMENTS = [[0, 1, 2, 3], [0, 1, 4, 5], [4, 5], [3]]
"""Sequences that share a prefix, and tails such as a store of new blocks offers."""
PIDS = [101, 102]
KEYS = [BlockKey(NAMESPACE, block_hash) for block_hash in HASHES]


def heads_of(mask: int) -> frozenset[int]:
    return frozenset(head for head in range(NUM_HEADS) if mask >> head & 1)


class LedgerMachine(RuleBasedStateMachine):
    """Rules are events; the invariant is agreement, and the core's own ``check()``."""

    def __init__(self) -> None:
        super().__init__()
        self.model = NaiveNode(NUM_SLOTS, NUM_HEADS)
        self.node = NodeState(NUM_SLOTS, NUM_HEADS, LruPolicy())
        self.headers: dict[int, tuple[str, int]] = dict.fromkeys(range(NUM_SLOTS), ("free", 0))
        """What a restart would find: state and pid of the writer."""
        self.num_sessions = 0
        self.sessions: dict[int, Holder] = {}
        self.owners: dict[int, Holder] = {}
        """Of every lease that this daemon granted."""

    # ---- plumbing

    def holder(self, pid: int) -> Holder:
        if pid not in self.sessions:
            self.num_sessions += 1
            self.sessions[pid] = Holder(self.num_sessions, pid)
        return self.sessions[pid]

    def handle(self, event: on.Event) -> list[do.Effect]:
        effects = self.node.handle(event, now_s=self.model.now_s)
        for effect in effects:
            match effect:
                case do.MarkWriting(slot, _, _, pid):
                    self.headers[slot] = ("writing", pid)
                case do.MarkReady(slot):
                    self.headers[slot] = ("ready", 0)
                case do.MarkFree(slot):
                    self.headers[slot] = ("free", 0)
        return effects

    # ---- reading

    @rule(
        pid=st.sampled_from(PIDS), document=st.sampled_from(DOCUMENTS),
        lease_s=st.sampled_from([1.0, 3.0, 100.0]),
    )  # fmt: skip
    def read(self, pid: int, document: list[int], lease_s: float) -> None:
        holder, deadline_s = self.holder(pid), self.model.now_s + lease_s
        hashes = [HASHES[idx] for idx in document]
        expected = self.model.readable(KEYS[idx] for idx in document)
        (reply,) = self.handle(on.ReadAsked(7, holder, NAMESPACE, 0, hashes, deadline_s))
        assert isinstance(reply, do.ReplyRead)
        assert list(reply.slots) == expected, "lent other slots than the readable prefix"
        assert reply.reply_to == 7
        assert bool(reply.lease_id) == bool(expected)
        if expected:
            cells = [self.model.cells[idx] for idx in expected]
            for cell in cells:
                assert cell.committed == ALL_HEADS, "a block was lent before all heads were there"
                cell.readers.append(reply.lease_id)
            self.model.reads[reply.lease_id] = Lease(holder, cells, frozenset(), deadline_s)
            self.owners[reply.lease_id] = holder

    @rule(data=st.data(), document=st.sampled_from(DOCUMENTS))
    def read_again(self, data: st.DataObject, document: list[int]) -> None:
        """A question that waited: its second lease takes the place of the first."""
        if not (leases := list(self.model.reads)):
            return
        before = data.draw(st.sampled_from(leases))
        holder, deadline_s = self.model.reads[before].holder, self.model.now_s + 3.0
        hashes = [HASHES[idx] for idx in document]
        expected = self.model.readable(KEYS[idx] for idx in document)
        asked = (7, holder, NAMESPACE, 0, hashes, deadline_s)
        reply, *_ = self.handle(on.ReadAskedAgain(*asked, LeaseId(before)))
        assert isinstance(reply, do.ReplyRead)
        assert list(reply.slots) == expected
        if expected:
            cells = [self.model.cells[idx] for idx in expected]
            for cell in cells:
                cell.readers.append(reply.lease_id)
            self.model.reads[reply.lease_id] = Lease(holder, cells, frozenset(), deadline_s)
            self.owners[reply.lease_id] = holder
        self.model.end_read(before)

    @rule(data=st.data(), pid=st.sampled_from(PIDS))
    def release(self, data: st.DataObject, pid: int) -> None:
        if not (leases := list(self.model.reads) or list(self.owners)):
            return
        lease_id = data.draw(st.sampled_from(leases))
        holder = data.draw(st.sampled_from([self.owners[lease_id], self.holder(pid)]))
        self.handle(on.ReadFinished(holder, [LeaseId(lease_id), LeaseId(999_999)]))
        lease = self.model.reads.get(lease_id)
        if lease is not None and lease.holder == holder:
            self.model.end_read(lease_id)

    # ---- storing

    @rule(
        pid=st.sampled_from(PIDS), document=st.sampled_from([*DOCUMENTS, [2, 2]]),
        mask=st.sampled_from([1, 2, 3]), lease_s=st.sampled_from([1.0, 3.0, 100.0]),
    )  # fmt: skip
    def store(self, pid: int, document: list[int], mask: int, lease_s: float) -> None:
        holder, deadline_s = self.holder(pid), self.model.now_s + lease_s
        hashes = [HASHES[idx] for idx in document]
        event = on.StoreAsked(7, holder, NAMESPACE, 0, hashes, mask, deadline_s)
        *effects, reply = self.handle(event)
        assert isinstance(reply, do.ReplyStore)
        keys = [KEYS[idx] for idx in document]
        self._make_room(keys, [e.slot for e in effects if isinstance(e, do.MarkFree)])
        cells = self._grant(keys, reply, heads_of(mask), pid)
        assert bool(reply.lease_id) == bool(cells)
        if cells:
            self.model.writes[reply.lease_id] = Lease(holder, cells, heads_of(mask), deadline_s)
            self.owners[reply.lease_id] = holder

    @rule(document=st.sampled_from(DOCUMENTS), lease_s=st.sampled_from([1.0, 3.0, 100.0]))
    def store_as_two_ranks(self, document: list[int], lease_s: float) -> None:
        """Two processes write their heads of the same blocks at the same time."""
        for rank, pid in enumerate(PIDS):
            self.store(pid, document, 1 << rank, lease_s)

    @rule(pid=st.sampled_from(PIDS), mask=st.sampled_from([0, 4, 7]))
    def store_heads_that_do_not_exist(self, pid: int, mask: int) -> None:
        event = on.StoreAsked(7, self.holder(pid), NAMESPACE, 0, HASHES, mask, 1e9)
        assert self.handle(event) == [do.ReplyStore(7, LeaseId(0), [do.NO_SLOT] * 6, 1e9)]

    @rule(pid=st.sampled_from(PIDS), document=st.sampled_from(DOCUMENTS))
    def store_whole(self, pid: int, document: list[int]) -> None:
        """What mostly happens, so that there is something to read."""
        before = set(self.model.writes)
        self.store(pid, document, 3, 100.0)
        for lease_id in set(self.model.writes) - before:
            lease = self.model.writes.pop(lease_id)
            is_stored = [True] * len(lease.cells)
            self.handle(on.StoreFinished(7, lease.holder, LeaseId(lease_id), is_stored))
            assert self.model.finish(lease_id, lease, is_stored) == len(lease.cells)

    def _make_room(self, keys: list[BlockKey], evicted: list[int]) -> None:
        cells = self.model.cells
        unknown = {key for key in keys if self.model.find(key) is None}
        evictable = [
            idx
            for idx, cell in cells.items()
            if cell.is_ready and not cell.readers and cell.key not in keys
        ]
        num_wanted = len(unknown) - sum(cell.is_free for cell in cells.values())
        assert set(evicted) <= set(evictable), "evicted what is lent or of the same sequence"
        assert len(evicted) == max(0, min(num_wanted, len(evictable)))
        for idx in evicted:
            cells[idx].unlist()

    def _grant(
        self, keys: list[BlockKey], reply: do.ReplyStore, heads: frozenset[int], pid: int
    ) -> list[Cell]:
        granted = []
        for key, slot in zip(keys, reply.slots, strict=True):
            cell = self.model.find(key)
            if cell is None:
                is_room = any(other.is_free for other in self.model.cells.values())
                assert (slot != do.NO_SLOT) == is_room
                if not is_room:
                    continue
                cell = self.model.cells[slot]
                assert not cell.readers, "a lent block's slot was given away"
                assert not cell.writers, "a slot was given away though a writer may still write"
                cell.key = key
            else:
                taken = cell.committed | cell.heads_on_the_way
                is_wanted = not cell.is_ready and not heads & taken
                assert (slot != do.NO_SLOT) == is_wanted
                if not is_wanted:
                    continue
                assert self.model.cells[slot] is cell
            cell.writers[reply.lease_id] = (self.holder(pid), heads)
            granted.append(cell)
        return granted

    @rule(data=st.data(), pid=st.sampled_from(PIDS), flags=st.sampled_from(["yes", "no", "some"]))
    def finish(self, data: st.DataObject, pid: int, flags: str) -> None:
        if not (leases := [*self.model.writes, *self.model.lost] or list(self.owners)):
            return
        lease_id = data.draw(st.sampled_from(leases))
        holder = data.draw(st.sampled_from([*[self.owners[lease_id]] * 3, self.holder(pid)]))
        lease = self.model.writes.get(lease_id)
        num_blocks = len(lease.cells) if lease else 1
        is_stored = {"yes": [True] * num_blocks, "no": [False] * num_blocks}.get(flags)
        if is_stored is None:
            is_stored = data.draw(st.lists(st.booleans(), min_size=0, max_size=num_blocks + 1))
        *_, reply = self.handle(on.StoreFinished(7, holder, LeaseId(lease_id), is_stored))
        if lease is not None and lease.holder == holder:
            if len(is_stored) != num_blocks:
                is_stored = [False] * num_blocks
            del self.model.writes[lease_id]
            expected = do.ReplyStored(7, self.model.finish(lease_id, lease, is_stored), False)
        else:
            expected = do.ReplyStored(7, 0, is_fenced=True)
            lost = self.model.lost.get(lease_id)
            if lost is not None and lost.holder == holder:
                del self.model.lost[lease_id]
                for cell in lost.cells:
                    del cell.writers[lease_id]
        assert reply == expected

    # ---- what happens to holders, and the rest

    @rule(pid=st.sampled_from(PIDS))
    def leave(self, pid: int) -> None:
        holder = self.sessions.pop(pid, None)
        if holder is None:
            return
        lost = [id_ for id_, lease in self.model.writes.items() if lease.holder == holder]
        read = [id_ for id_, lease in self.model.reads.items() if lease.holder == holder]
        effects = self.handle(on.HolderLeft(holder))
        assert (do.WatchProcess(pid) in effects) >= bool(lost), "nobody waits for a lost writer"
        for lease_id in read:
            self.model.end_read(lease_id)
        for lease_id in lost:
            self.model.lose(lease_id)

    @rule(pid=st.sampled_from([*PIDS, UNKNOWN_PID]), sessions_ago=st.none() | st.integers(-1, 2))
    def quiet(self, pid: int, sessions_ago: int | None) -> None:
        session = None if sessions_ago is None else self.num_sessions - sessions_ago
        self.handle(on.HolderQuiet(pid, session))
        self.model.quiet(pid, session)

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.model.pass_time(self.model.now_s + seconds)
        self.handle(on.TimePassed())

    @rule(
        document=st.sampled_from(DOCUMENTS),
        num_blocks=st.integers(1, 4),
        event=st.sampled_from([on.BlocksFoundCorrupt, on.BlocksDropped]),
    )
    def corrupt(
        self,
        document: list[int],
        num_blocks: int,
        event: type[on.BlocksFoundCorrupt] | type[on.BlocksDropped],
    ) -> None:
        idxs = document[:num_blocks]
        self.handle(event(NAMESPACE, 0, [HASHES[idx] for idx in idxs]))
        for cell in [self.model.find(KEYS[idx]) for idx in idxs]:
            if cell is not None and cell.is_ready:
                cell.unlist()

    @rule()
    def clear(self) -> None:
        cells = [cell for cell in self.model.cells.values() if cell.key is not None]
        num_kept = sum(bool(cell.readers or cell.writers) for cell in cells)
        num_cleared = sum(cell.is_ready and not cell.readers for cell in cells)
        *_, reply = self.handle(on.ClearAsked(7))
        assert reply == do.ReplyCleared(7, num_cleared, num_kept)
        for cell in cells:
            cell.unlist()

    @rule(rotten=st.sets(st.integers(0, NUM_SLOTS - 1), max_size=1))
    def restart(self, rotten: set[int]) -> None:
        """The daemon dies: all leases are void, and what the headers say is all there is."""
        self.node = NodeState(NUM_SLOTS, NUM_HEADS, LruPolicy())
        self.sessions.clear()
        self.owners.clear()
        self.model.reads, self.model.writes, self.model.lost = {}, {}, {}
        for idx, (state, pid) in list(self.headers.items()):
            cell = self.model.cells[idx]
            cell.readers = []
            if state == "ready" and idx not in rotten and cell.key is not None:
                self.handle(on.BlockRecovered(cell.key, idx))
                continue
            pids = {holder.pid for holder, _ in cell.writers.values()}
            assert state == "writing" or not pids, "a restart would not wait for a writer"
            assert pid == UNKNOWN_PID or pids <= {pid}, "the header names one writer of several"
            cell.unlist()
            if state == "writing":
                waited = [pid] if pid != UNKNOWN_PID else PIDS
                for one in waited:
                    assert do.WatchProcess(one) in self.handle(on.WriteRecovered(idx, one))
                cell.writers = {("restart", one): (Holder(0, one), frozenset()) for one in waited}
            else:
                self.headers[idx] = ("free", 0)

    # ---- agreement

    @invariant()
    def the_core_is_consistent(self) -> None:
        self.node.check()

    @invariant()
    def the_same_blocks_are_readable(self) -> None:
        for key in KEYS:
            found = self.node.ledger.readable_prefix(NAMESPACE, 0, [key.block_hash])
            assert [slot.idx for slot in found] == self.model.readable([key])

    @invariant()
    def the_same_slots_are_free(self) -> None:
        free = [idx for idx, cell in self.model.cells.items() if cell.is_free]
        assert self.node.ledger.num_free == len(free)
        assert all(self.node.ledger.slots[idx].state.value == "free" for idx in free)

    @invariant()
    def headers_tell_a_restart_the_truth(self) -> None:
        for idx, cell in self.model.cells.items():
            state = self.headers[idx][0]
            is_written = bool(cell.writers) or (cell.key is not None and not cell.is_ready)
            assert state == ("ready" if cell.is_ready else "writing" if is_written else "free")

    def teardown(self) -> None:
        """Once every process is gone and time has passed, nothing is lent or fenced."""
        for pid in PIDS:
            self.leave(pid)
            self.quiet(pid, None)
        self.wait(1000.0)
        assert [*self.node.reads, *self.node.writes] == []
        assert {slot.state.value for slot in self.node.ledger.slots} <= {"free", "ready"}
        self.node.check()


def run(max_examples: int, *, seeded: bool = False) -> None:
    run_state_machine_as_test(
        LedgerMachine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=40,
            deadline=None,
            database=None,
            derandomize=seeded or settings().derandomize,
            report_multiple_bugs=False,
            phases=[Phase.generate] if seeded else list(Phase),
        ),
    )


@pytest.mark.slow
def test_no_sequence_of_events_breaks_a_promise() -> None:
    """Whatever happens in whatever order, the core does what the naive model says."""
    run(150)


# ---- planted bugs: a machine that finds nothing proves nothing


def _evict_lent_blocks(ledger: BlockLedger, num_blocks: int, _: Namespace) -> list[Slot]:
    victims = ledger.accounts.others.policy.victims(num_blocks, lambda _: True)
    slots = [ledger.slots[idx] for idx in victims]
    for slot in slots:
        slot.num_pins = 0
        ledger._forget(slot)
    return slots


def _free_at_the_deadline(node: NodeState, leases: Iterable[WriteLease]) -> list[do.Effect]:
    effects: list[do.Effect] = []
    for lease in leases:
        node.writes.end(lease)
        effects += [*node._quiet(lease), do.WatchProcess(lease.holder.pid)]
    return effects


def _ready_without_all_heads(ledger: BlockLedger, slot: Slot, head_mask: int) -> bool:
    slot.missing_heads = 0
    return _finish_heads(ledger, slot, head_mask)


def _believe_late_writers(node: NodeState, event: on.StoreFinished) -> list[do.Effect]:
    lost = node._lost.get(event.holder.pid, {}).pop(event.lease_id, None)
    for slot in lost.slots if lost else ():
        slot.num_writers = 0
        node.ledger.unfence(slot)
    return [do.MarkFree(slot.idx) for slot in lost.slots] if lost else []


def _keep_what_is_being_written(node: NodeState, event: on.ClearAsked, _: float) -> list[do.Effect]:
    ready = node.ledger.ready_slots()
    return [*node._doom(ready), do.ReplyCleared(event.reply_to, len(ready), 0)]


def _quiet_though_unknown(node: NodeState, event: on.HolderQuiet, now_s: float) -> list[do.Effect]:
    return _holder_quiet(node, on.HolderQuiet(event.pid or PIDS[0]), now_s)


def _quiet_of_later_sessions(
    node: NodeState, event: on.HolderQuiet, now_s: float
) -> list[do.Effect]:
    return _holder_quiet(node, on.HolderQuiet(event.pid), now_s)


def _name_the_first_writer(node: NodeState, event: on.StoreAsked, now_s: float) -> list[do.Effect]:
    effects = _store_asked(node, event, now_s)
    return [e for e in effects if not isinstance(e, do.MarkWriting) or e.pid != UNKNOWN_PID]


_finish_heads = BlockLedger.finish_heads
_store_asked = NodeState._store_asked
_holder_quiet = NodeState._holder_quiet

PLANTED: list[tuple[type, str, Callable[..., object]]] = [
    (BlockLedger, "evict", _evict_lent_blocks),
    (NodeState, "_lose", _free_at_the_deadline),
    (BlockLedger, "finish_heads", _ready_without_all_heads),
    (NodeState, "_late_writer_quiet", _believe_late_writers),
    (NodeState, "_clear_asked", _keep_what_is_being_written),
    (NodeState, "_holder_quiet", _quiet_though_unknown),
    (NodeState, "_holder_quiet", _quiet_of_later_sessions),
    (NodeState, "_store_asked", _name_the_first_writer),
]


@pytest.mark.parametrize(
    ("owner", "name", "bug"), PLANTED, ids=[row[2].__name__ for row in PLANTED]
)
def test_the_machine_finds_a_planted_bug(
    owner: type, name: str, bug: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A core with one of these bugs does not get past the machine."""
    monkeypatch.setattr(owner, name, bug)

    with pytest.raises((AssertionError, InvariantError, KeyError)):
        run(1000, seeded=True)
