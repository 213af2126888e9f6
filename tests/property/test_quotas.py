"""Quotas of tenants against their promises: any stores and leases, and all of them hold."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.core import effects as do
from kvkeep.core import events as on
from kvkeep.core.blocks import BlockLedger, BlockState, Slot
from kvkeep.core.eviction.base import EvictionPolicy
from kvkeep.core.eviction.lru import LruPolicy
from kvkeep.core.eviction.s3fifo import S3FifoPolicy
from kvkeep.core.node import NodeState
from kvkeep.core.quotas import OTHERS, make_accounts
from kvkeep.model.ids import BlockHash, Holder, LeaseId, Namespace
from kvkeep.model.tenant import TAG_BYTES, tag_of

TENANTS = ["a", "b", "c", "stranger", "other stranger"]
"""The last two have no share of their own."""
HOLDER = Holder(1, 100)
FOREVER_S = 1e9


@dataclass(frozen=True)
class Step:
    """One store or read of new or known blocks."""

    tenant: str
    first: int
    num_blocks: int
    is_read: bool
    is_released: bool


STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(TENANTS), st.integers(0, 12), st.integers(1, 6),
        st.booleans(), st.booleans(),
    ),
    max_size=60,
)  # fmt: skip
SHARES = st.lists(st.integers(0, 4), min_size=3, max_size=3).map(
    lambda parts: {name: part / 12 for name, part in zip("abc", parts, strict=True)}
)


class Pool:
    """A node with quotas, and what must be true of every store."""

    def __init__(self, num_slots: int, shares: dict[str, float], *, is_lru: bool) -> None:
        def policy(num: int) -> EvictionPolicy:
            return LruPolicy() if is_lru else S3FifoPolicy(num)

        tenants = make_accounts(num_slots, shares, policy)
        self.node = NodeState(num_slots, 1, policy(num_slots), tenants)
        self.ledger = self.node.ledger
        self.leases: list[LeaseId] = []

    def take(self, step: Step) -> None:
        """Carry out one step."""
        namespace = Namespace(step.tenant.encode().ljust(24, b".") + tag_of(step.tenant))
        blocks = range(step.first, step.first + step.num_blocks)
        hashes = [BlockHash(bytes([idx]) * 32) for idx in blocks]
        if step.is_read:
            self._read(namespace, hashes)
        else:
            self._store(namespace, hashes)
        if step.is_released:
            self.node.handle(on.ReadFinished(HOLDER, self.leases), now_s=0.0)
            self.leases = []
        self.node.check()

    def _read(self, namespace: Namespace, hashes: list[BlockHash]) -> None:
        event = on.ReadAsked(0, HOLDER, namespace, 0, hashes, FOREVER_S)
        (reply,) = self.node.handle(event, now_s=0.0)
        assert isinstance(reply, do.ReplyRead)
        self.leases.append(reply.lease_id)

    def _store(self, namespace: Namespace, hashes: list[BlockHash]) -> None:
        before = self._evictable()
        num_free, held = self.ledger.num_free, self._held()
        event = on.StoreAsked(0, HOLDER, namespace, 0, hashes, 1, FOREVER_S)
        *effects, reply = self.node.handle(event, now_s=0.0)
        assert isinstance(reply, do.ReplyStore)
        gone = [before[effect.slot] for effect in effects if isinstance(effect, do.MarkFree)]
        self._judge(namespace, gone, num_free, held, reply)
        if reply.lease_id:
            stored = [slot != do.NO_SLOT for slot in reply.slots]
            done = on.StoreFinished(0, HOLDER, reply.lease_id, [True] * sum(stored))
            self.node.handle(done, now_s=0.0)

    def _name(self, namespace: Namespace) -> str:
        tags = {tag_of(account.name): account.name for account in self.ledger.accounts.tenants}
        return tags.get(namespace[-TAG_BYTES:], OTHERS)

    def _evictable(self) -> dict[int, str]:
        """Owner's name by slot."""
        return {
            slot.idx: self._name(slot.key.namespace)
            for slot in self.ledger.ready_slots()
            if slot.key is not None and not slot.num_pins
        }

    def _held(self) -> dict[str, int]:
        names = [self._name(slot.key.namespace) for slot in self.ledger.slots if slot.key]
        return {name: names.count(name) for name in (OTHERS, "a", "b", "c")}

    def _judge(
        self,
        namespace: Namespace,
        gone: list[str],
        num_free: int,
        held: dict[str, int],
        reply: do.ReplyStore,
    ) -> None:
        accounts = self.ledger.accounts
        quota = {account.name: account.quota for account in (*accounts.tenants, accounts.others)}
        mine = self._name(namespace)
        for name in set(gone) - {mine}:
            left = held[name] - gone.count(name)
            assert left >= quota[name], "a tenant within its quota lost a block to another"
        after = self._held()
        assert after[mine] <= max(quota[mine], held[mine] + num_free), "grew at another's cost"
        is_refused = do.NO_SLOT in reply.slots and self.ledger.num_free == 0
        evictable = list(self._evictable().values())
        if is_refused and after[mine] < quota[mine]:
            spare = [n for n in set(evictable) - {mine} if after[n] > quota[n]]
            is_known = any(slot.key and slot.key.namespace == namespace for slot in self._ready())
            assert not spare or is_known, "room was there, and it was refused its own"

    def _ready(self) -> list[Slot]:
        return [slot for slot in self.ledger.slots if slot.state is BlockState.READY]


def check(num_slots: int, shares: dict[str, float], steps: list[Step], *, is_lru: bool) -> None:
    """Take these steps one after the other."""
    pool = Pool(num_slots, shares, is_lru=is_lru)
    for step in steps:
        pool.take(step)


@settings(max_examples=150, deadline=None)
@given(st.integers(4, 24), SHARES, STEPS, st.booleans())
def test_quotas_keep_their_promises(
    num_slots: int, shares: dict[str, float], steps: list[Step], is_lru: bool
) -> None:
    """No one within its quota loses to another, none grows at another's cost, and counts agree."""
    check(num_slots, shares, steps, is_lru=is_lru)


def test_a_planted_bug_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eviction that asks nobody's quota does not pass."""

    def evict(ledger: BlockLedger, num_blocks: int, _: Namespace) -> list[Slot]:
        found: list[Slot] = []
        for account in ledger.accounts.all:
            found += ledger._evict_of(account, num_blocks - len(found))
        return found

    monkeypatch.setattr(BlockLedger, "evict", evict)
    steps = [Step("a", 0, 6, False, False), Step("b", 0, 6, False, False)]

    with pytest.raises(AssertionError, match="lost a block to another"):
        check(8, {"a": 0.5, "b": 0.5}, steps, is_lru=True)
