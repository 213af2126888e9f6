"""What a node answers in each situation; sequences of them are in tests/property/test_ledger.py."""

from collections.abc import Iterator, Sequence

import pytest

from kvkeep.core import effects as do
from kvkeep.core import events as on
from kvkeep.core import node as node_module
from kvkeep.core.eviction.lru import LruPolicy
from kvkeep.core.node import NodeState
from kvkeep.model.ids import UNKNOWN_PID, BlockHash, BlockKey, Holder, LeaseId, Namespace

NAMESPACE = Namespace(b"n" * 32)
HASHES = [BlockHash(bytes([idx]) * 32) for idx in range(8)]
KEYS = [BlockKey(NAMESPACE, block_hash) for block_hash in HASHES]
READER, WRITER, OTHER = Holder(1, 11), Holder(2, 12), Holder(3, 13)
BOTH = 0b11


class Host:
    """A node of two heads with short ways to say what happens to it."""

    def __init__(self, num_slots: int = 4) -> None:
        self.node = NodeState(num_slots, 2, LruPolicy())
        self.now_s = 0.0

    def handle(self, event: on.Event) -> list[do.Effect]:
        return self.node.handle(event, now_s=self.now_s)

    def read(self, *idxs: int, holder: Holder = READER, deadline_s: float = 10.0) -> do.ReplyRead:
        hashes = [HASHES[idx] for idx in idxs]
        (reply,) = self.handle(on.ReadAsked(5, holder, NAMESPACE, 0, hashes, deadline_s))
        assert isinstance(reply, do.ReplyRead)
        return reply

    def read_again(self, first: do.ReplyRead, *idxs: int) -> list[do.Effect]:
        hashes = [HASHES[idx] for idx in idxs]
        event = on.ReadAskedAgain(5, READER, NAMESPACE, 0, hashes, 10.0, first.lease_id)
        return self.handle(event)

    def ask_store(
        self, *idxs: int, holder: Holder = WRITER, heads: int = BOTH, deadline_s: float = 10.0
    ) -> tuple[list[do.Effect], do.ReplyStore]:
        hashes = [HASHES[idx] for idx in idxs]
        event = on.StoreAsked(6, holder, NAMESPACE, 0, hashes, heads, deadline_s)
        *effects, reply = self.handle(event)
        assert isinstance(reply, do.ReplyStore)
        return effects, reply

    def finish(
        self, lease_id: LeaseId, is_stored: Sequence[bool], holder: Holder = WRITER
    ) -> tuple[list[do.Effect], do.ReplyStored]:
        *effects, reply = self.handle(on.StoreFinished(7, holder, lease_id, is_stored))
        assert isinstance(reply, do.ReplyStored)
        return effects, reply

    def store(self, *idxs: int) -> list[int]:
        _, reply = self.ask_store(*idxs)
        self.finish(reply.lease_id, [True] * sum(slot != do.NO_SLOT for slot in reply.slots))
        return list(reply.slots)

    def pass_time(self, now_s: float) -> list[do.Effect]:
        self.now_s = now_s
        return self.handle(on.TimePassed())


@pytest.fixture
def host() -> Iterator[Host]:
    """A node whose invariants hold when the test is over."""
    made = Host()
    yield made
    made.node.check()


# ---- reading


def test_nothing_is_lent_of_nothing(host: Host) -> None:
    """A miss has no lease, so there is nothing to give back."""
    assert host.read(0, 1) == do.ReplyRead(5, LeaseId(0), (), 10.0)
    assert len(host.node.reads) == 0


def test_the_readable_prefix_is_lent(host: Host) -> None:
    """As many leading blocks as there are come under one lease."""
    slots = host.store(0, 1)
    reply = host.read(0, 1, 2)

    assert reply == do.ReplyRead(5, LeaseId(2), slots, 10.0)
    assert host.node.counters["blocks_lent"] == 2


def test_a_question_that_was_asked_again_counts_once(host: Host) -> None:
    """One question, each block lent once, one lease, and no use by the first one's end."""
    host.store(0, 1, 2)
    first = host.read(0, 1, 3)
    host.store(3)
    (reply,) = host.read_again(first, 0, 1, 3)

    assert isinstance(reply, do.ReplyRead)
    assert len(reply.slots) == 3
    assert len(host.node.reads) == 1
    counters = host.node.counters
    assert (counters["lookups"], counters["lookup_blocks"], counters["blocks_lent"]) == (1, 3, 3)
    host.handle(on.ReadFinished(READER, [reply.lease_id]))
    assert [slot.num_pins for slot in host.node.ledger.slots] == [0] * 4


def test_a_question_asked_again_after_a_clear_lends_nothing(host: Host) -> None:
    """What the first answer kept is free then."""
    host.store(0, 1)
    first = host.read(0, 1, 2)
    host.handle(on.ClearAsked(8))
    reply, *effects = host.read_again(first, 0, 1, 2)

    assert reply == do.ReplyRead(5, LeaseId(0), (), 10.0)
    assert len(effects) == 2
    assert host.node.ledger.num_free == 4
    assert host.node.counters["blocks_lent"] == 2


def test_a_stranger_cannot_end_a_lease(host: Host) -> None:
    """A lease ends for its holder only; what is unknown is ignored."""
    host.store(0)
    lease_id = host.read(0).lease_id
    host.handle(on.ReadFinished(OTHER, [lease_id, LeaseId(77)]))
    assert len(host.node.reads) == 1

    host.handle(on.ReadFinished(READER, [lease_id, lease_id]))
    assert len(host.node.reads) == 0


def test_a_lease_ends_at_its_deadline(host: Host) -> None:
    """A block whose lease expired may be evicted while the reader still runs."""
    host.store(0, 1, 2, 3)
    host.read(0, 1, 2, 3, deadline_s=5.0)
    assert host.ask_store(4)[1].slots == [do.NO_SLOT]

    host.pass_time(5.0)
    effects, reply = host.ask_store(4)
    assert effects[0] == do.MarkFree(3)
    assert reply.slots == [3]
    assert host.node.counters["leases_expired"] == 1


def test_a_block_found_corrupt_is_not_lent_again(host: Host) -> None:
    """Who reads it may end in peace; its header goes at once, so that no restart brings it back."""
    (slot,) = host.store(0)
    lease_id = host.read(0).lease_id
    event = on.BlocksFoundCorrupt(NAMESPACE, 0, [HASHES[0], HASHES[0], HASHES[5]])

    assert host.handle(event) == [do.MarkFree(slot)]
    assert host.read(0).lease_id == 0
    assert host.node.ledger.num_free == 3
    assert host.handle(on.ReadFinished(READER, [lease_id])) == [do.MarkFree(slot)]
    assert host.node.ledger.num_free == 4
    assert host.node.counters["blocks_corrupt"] == 1


def test_a_dropped_block_is_gone_and_not_called_corrupt(host: Host) -> None:
    """It may be stored anew; whoever reads it ends in peace."""
    host.store(0)

    host.handle(on.BlocksDropped(NAMESPACE, 0, [HASHES[0], HASHES[5]]))

    assert host.read(0).lease_id == 0
    assert host.node.ledger.num_free == 4
    assert host.node.counters["blocks_corrupt"] == 0


# ---- storing


def test_a_grant_marks_the_header_first(host: Host) -> None:
    """Before the writer learns of its slot, the header says who is about to write."""
    effects, reply = host.ask_store(0)

    assert effects == [do.MarkWriting(0, KEYS[0], LeaseId(1), WRITER.pid)]
    assert reply == do.ReplyStore(6, LeaseId(1), [0], 10.0)


def test_stored_blocks_are_not_asked_for_again(host: Host) -> None:
    """What is stored or being written gets no slot; if all is, there is no lease."""
    host.store(0)
    host.ask_store(1, holder=OTHER)
    _, reply = host.ask_store(0, 1, 2, 2)
    assert reply.slots == [do.NO_SLOT, do.NO_SLOT, 2, do.NO_SLOT]

    assert host.ask_store(0, 1)[1].lease_id == 0


def test_a_block_is_ready_when_all_ranks_have_committed(host: Host) -> None:
    """Ranks write their heads of one slot under leases of their own."""
    _, one = host.ask_store(0, heads=0b01, holder=WRITER)
    effects, two = host.ask_store(0, heads=0b10, holder=OTHER)
    assert one.slots == two.slots == [0]
    assert effects == [do.MarkWriting(0, KEYS[0], LeaseId(2), UNKNOWN_PID)]

    assert host.finish(one.lease_id, [True]) == ([], do.ReplyStored(7, 0, False))
    assert host.read(0).lease_id == 0
    effects, reply = host.finish(two.lease_id, [True], holder=OTHER)
    assert effects == [do.MarkReady(0, KEYS[0])]
    assert reply == do.ReplyStored(7, 1, False)


def test_heads_are_granted_once(host: Host) -> None:
    """A head that is committed, or that somebody writes, is not granted to another."""
    _, one = host.ask_store(0, heads=0b01)
    assert host.ask_store(0, heads=0b11, holder=OTHER)[1].lease_id == 0
    host.finish(one.lease_id, [True])

    assert host.ask_store(0, heads=0b01, holder=OTHER)[1].lease_id == 0
    effects, reply = host.ask_store(0, heads=0b10, holder=OTHER)
    assert reply.slots == [0]
    assert effects == [do.MarkWriting(0, KEYS[0], reply.lease_id, OTHER.pid)]


@pytest.mark.parametrize("heads", [0, 0b100, 0b111])
def test_heads_that_do_not_exist_get_nothing(host: Host, heads: int) -> None:
    """A request for other heads than the layout has changes nothing."""
    assert host.ask_store(0, heads=heads) == ([], do.ReplyStore(6, LeaseId(0), [do.NO_SLOT], 10.0))
    assert host.node.ledger.num_free == 4


def test_a_failed_copy_frees_its_slot(host: Host) -> None:
    """Of one lease, blocks that arrived are kept and the others given up."""
    _, reply = host.ask_store(0, 1)
    effects, stored = host.finish(reply.lease_id, [True, False])

    assert effects == [do.MarkFree(1), do.MarkReady(0, KEYS[0])]
    assert stored == do.ReplyStored(7, 1, False)


def test_a_commit_of_another_length_counts_as_failed(host: Host) -> None:
    """A writer that does not say of each block how it went has stored none."""
    _, reply = host.ask_store(0, 1)

    assert host.finish(reply.lease_id, [True])[1] == do.ReplyStored(7, 0, False)
    assert host.node.ledger.num_free == 4


def test_an_incomplete_block_expires(host: Host) -> None:
    """When the other ranks never come, the slot is free again at the lease's deadline."""
    _, reply = host.ask_store(0, heads=0b01, deadline_s=5.0)
    host.finish(reply.lease_id, [True])
    assert host.pass_time(4.9) == []

    assert host.pass_time(5.0) == [do.MarkFree(0)]
    assert host.node.ledger.num_free == 4


def test_a_sequence_does_not_evict_itself(host: Host) -> None:
    """Room for new blocks of a sequence is made from other sequences only."""
    host.store(0, 1)
    host.store(5, 6)
    effects, reply = host.ask_store(0, 1, 2, 3, 4)

    assert effects[:2] == [do.MarkFree(3), do.MarkFree(2)]
    assert reply.slots == [do.NO_SLOT, do.NO_SLOT, 3, 2, do.NO_SLOT]
    assert host.node.counters["stores_without_room"] == 1
    assert host.node.counters["blocks_evicted"] == 2


def test_a_block_named_twice_needs_room_once(host: Host) -> None:
    """A request that repeats itself evicts no more than it fills."""
    host.store(0, 1, 2, 3)
    effects, _ = host.ask_store(5, 5, 5)

    assert [effect for effect in effects if isinstance(effect, do.MarkFree)] == [do.MarkFree(3)]


def test_there_is_a_limit_to_leases(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit nothing is lent or granted, and all goes on when a lease ends."""
    host.store(0)
    monkeypatch.setattr(node_module, "LEASES_MAX", 1)
    lease_id = host.read(0).lease_id
    host.ask_store(1)
    assert host.read(0).lease_id == 0
    assert host.ask_store(2)[1] == do.ReplyStore(6, LeaseId(0), [do.NO_SLOT], 10.0)

    host.handle(on.ReadFinished(READER, [lease_id]))
    assert host.read(0).lease_id


# ---- writers that are lost


def test_an_overdue_writer_is_fenced(host: Host) -> None:
    """At the deadline the slot is out of reach but not free; the late commit is refused."""
    _, reply = host.ask_store(0, deadline_s=5.0)
    assert host.pass_time(5.0) == [do.WatchProcess(WRITER.pid)]
    assert host.node.ledger.num_free == 3

    effects, stored = host.finish(reply.lease_id, [True])
    assert stored == do.ReplyStored(7, 0, is_fenced=True)
    assert effects == [do.MarkFree(0)]
    assert host.read(0).lease_id == 0


def test_a_commit_for_a_stranger_is_refused(host: Host) -> None:
    """Nobody commits under another session's lease, and the lease goes on."""
    _, reply = host.ask_store(0)

    assert host.finish(reply.lease_id, [True], holder=OTHER)[1].is_fenced
    assert host.finish(reply.lease_id, [True])[1].num_ready == 1


def test_a_session_that_ends_is_no_proof_of_quiet(host: Host) -> None:
    """Its reads are over, its writes fenced until the process is dead or says that it is done."""
    host.store(3)
    host.read(3, holder=WRITER)
    host.ask_store(0)

    assert host.handle(on.HolderLeft(WRITER)) == [do.WatchProcess(WRITER.pid)]
    assert len(host.node.reads) == 0
    assert host.node.ledger.num_free == 2
    assert host.handle(on.HolderQuiet(WRITER.pid)) == [do.MarkFree(1)]
    assert host.node.ledger.num_free == 3


def test_a_fence_waits_for_every_writer(host: Host) -> None:
    """With two processes at one slot, the proof of one does not free it."""
    _, one = host.ask_store(0, heads=0b01, deadline_s=5.0)
    host.ask_store(0, heads=0b10, holder=OTHER, deadline_s=50.0)
    host.pass_time(5.0)

    assert host.finish(one.lease_id, [True])[0] == []
    assert host.node.ledger.num_free == 3
    assert host.handle(on.HolderQuiet(OTHER.pid)) == [do.MarkFree(0)]


def test_a_death_is_noticed_before_the_session_ends(host: Host) -> None:
    """A dead process' running leases are over at once, and its session ends without a fence."""
    host.ask_store(0)

    assert host.handle(on.HolderQuiet(WRITER.pid)) == [do.MarkFree(0)]
    assert host.handle(on.HolderLeft(WRITER)) == []
    assert host.node.ledger.num_free == 4


def test_a_greeting_proves_nothing_about_newer_sessions(host: Host) -> None:
    """A greeting that is read late does not end what the process writes by now."""
    newer = Holder(9, WRITER.pid)
    host.ask_store(0, holder=WRITER)
    _, reply = host.ask_store(1, holder=newer)

    assert host.handle(on.HolderQuiet(WRITER.pid, before_session=8)) == [do.MarkFree(0)]
    assert host.finish(reply.lease_id, [True], holder=newer)[1].num_ready == 1


def test_a_proof_of_some_sessions_leaves_those_of_others(host: Host) -> None:
    """One of two engines in a process speaks for the copies that it began itself."""
    other = Holder(8, WRITER.pid)
    host.ask_store(0, holder=WRITER)
    host.ask_store(1, holder=other)
    for holder in (WRITER, other):
        host.handle(on.HolderLeft(holder))

    mine = frozenset({WRITER.session_id})
    assert host.handle(on.HolderQuiet(WRITER.pid, 9, mine)) == [do.MarkFree(0)]
    assert host.node.ledger.num_free == 3


def test_an_unknown_process_proves_nothing(host: Host) -> None:
    """Processes without an id can't be told apart, so no proof is taken for any of them."""
    unknown = Holder(4, UNKNOWN_PID)
    host.ask_store(0, holder=unknown)
    host.handle(on.HolderLeft(unknown))

    assert host.handle(on.HolderQuiet(UNKNOWN_PID)) == []
    assert host.node.ledger.num_free == 3


# ---- recovery and clearing


def test_recovered_blocks_are_lent(host: Host) -> None:
    """A block whose header survived is readable; the same block in a second slot is dropped."""
    assert host.handle(on.BlockRecovered(KEYS[0], 2)) == []
    assert host.handle(on.BlockRecovered(KEYS[0], 3)) == [do.MarkFree(3)]

    assert host.read(0).slots == [2]


def test_a_write_of_an_earlier_daemon_is_waited_for(host: Host) -> None:
    """The slot stays fenced until each process that may be writing is quiet."""
    assert host.handle(on.WriteRecovered(1, 11)) == [do.WatchProcess(11)]
    assert host.handle(on.WriteRecovered(1, 12)) == [do.WatchProcess(12)]
    host.node.check()

    assert host.handle(on.HolderQuiet(11)) == []
    assert host.node.ledger.num_free == 3
    assert host.handle(on.HolderQuiet(12, before_session=1)) == [do.MarkFree(1)]


def test_a_clear_takes_everything(host: Host) -> None:
    """What nobody uses goes at once; what is lent or being written is out of reach at once."""
    host.store(0, 1)
    host.read(0)
    _, writing = host.ask_store(2)
    _, half = host.ask_store(3, heads=0b01)
    host.finish(half.lease_id, [True])

    *effects, reply = host.handle(on.ClearAsked(8))
    assert effects == [do.MarkFree(0), do.MarkFree(1), do.MarkFree(3)]
    assert reply == do.ReplyCleared(8, num_cleared=1, num_kept=2)
    assert host.finish(writing.lease_id, [True]) == (
        [do.MarkFree(2)],
        do.ReplyStored(7, 0, is_fenced=False),
    )
    assert host.read(2).lease_id == 0
    assert host.node.ledger.num_free == 3


DAMAGE = {
    "a pin nobody holds": ("num_pins", 1),
    "a writer without a lease": ("num_writers", 1),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_the_check_finds_damage(name: str) -> None:
    """A count that no lease stands for is found."""
    host = Host()
    host.store(0)
    setattr(host.node.ledger.slots[0], *DAMAGE[name])

    with pytest.raises(AssertionError):
        host.node.check()
