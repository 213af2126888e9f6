"""Tenants' quotas of one pool: who may fill it, who gives way, and who never does."""

import pytest

from kvkeep.core.blocks import BlockLedger
from kvkeep.core.eviction.lru import LruPolicy
from kvkeep.core.quotas import TENANTS_MAX, Account, Accounts, make_accounts
from kvkeep.model.ids import CANARY_NAMESPACE, BlockHash, BlockKey, Namespace
from kvkeep.model.tenant import tag_of

NUM_SLOTS = 10


def of_tenant(name: str) -> Namespace:
    """A namespace of this tenant."""
    return Namespace(b"n" * 24 + tag_of(name))


class Pool:
    """Ten slots: half for ``a``, three for ``b``, two for all others."""

    def __init__(self, **shares: float) -> None:
        tenants = make_accounts(NUM_SLOTS, shares or {"a": 0.5, "b": 0.3}, lambda _: LruPolicy())
        self.ledger = BlockLedger(NUM_SLOTS, 1, LruPolicy(), tenants)
        self.num_stored = 0

    def store(self, name: str, num_blocks: int, *, is_pinned: bool = False) -> int:
        """Store new blocks one by one; gives how many found room."""
        return sum(self._store_one(of_tenant(name), is_pinned=is_pinned) for _ in range(num_blocks))

    def _store_one(self, namespace: Namespace, *, is_pinned: bool) -> bool:
        self.num_stored += 1
        key = BlockKey(namespace, BlockHash(self.num_stored.to_bytes(32, "little")))
        if not self.ledger.num_free:
            self.ledger.evict(1, namespace)
        slot = self.ledger.begin_write(key)
        if slot is not None:
            self.ledger.finish_heads(slot, 1)
            self.ledger.pin([slot] if is_pinned else [])
        self.ledger.check()
        return slot is not None

    def held(self, name: str) -> int:
        """Blocks of a tenant, or of others, in the pool."""
        return self.ledger.accounts.find(of_tenant(name)).num_held


def test_quotas_add_up_to_the_pool() -> None:
    """What no tenant was given is the others'."""
    accounts = Pool().ledger.accounts

    assert [account.quota for account in (*accounts.tenants, accounts.others)] == [5, 3, 2]


def test_a_tenant_alone_may_fill_the_pool() -> None:
    """Free room is anyone's."""
    pool = Pool()

    assert pool.store("b", 12) == 12
    assert pool.held("b") == NUM_SLOTS


def test_a_tenant_gets_its_quota_back_from_whoever_is_over_theirs() -> None:
    """What one borrowed it gives back as the other needs it, and not more."""
    pool = Pool()
    pool.store("b", 10)
    pool.store("a", 20)

    assert (pool.held("a"), pool.held("b")) == (5, 5)
    pool.store("stranger", 20)
    assert (pool.held("a"), pool.held("b"), pool.held("stranger")) == (5, 3, 2)


def test_the_one_most_over_its_quota_gives_way_first() -> None:
    """Of two that borrowed, who borrowed more gives first."""
    pool = Pool()
    pool.store("stranger", 4)
    pool.store("b", 6)
    pool.store("a", 1)

    assert (pool.held("b"), pool.held("stranger")) == (5, 4)


def test_beyond_its_quota_a_tenant_evicts_its_own() -> None:
    """Nobody grows at another's cost beyond what it can count on."""
    pool = Pool()
    pool.store("a", 5)
    pool.store("b", 5)

    assert pool.store("b", 7) == 7
    assert (pool.held("a"), pool.held("b")) == (5, 5)


def test_leased_blocks_stay_and_the_asker_makes_do() -> None:
    """What is lent can't be reclaimed: the tenant then makes room among its own."""
    pool = Pool()
    pool.store("b", 9, is_pinned=True)
    pool.store("a", 1)

    assert pool.store("a", 3) == 3
    assert (pool.held("a"), pool.held("b")) == (1, 9)


def test_who_has_no_share_left_uses_free_room_only() -> None:
    """With all shares given away, others store while there is room and take nothing."""
    pool = Pool(a=0.5, b=0.5)
    assert pool.store("stranger", 3) == 3
    pool.store("a", 5)
    pool.store("b", 5)

    assert (pool.held("a"), pool.held("b"), pool.held("stranger")) == (5, 5, 0)
    assert pool.store("stranger", 1) == 0


def test_a_canary_always_finds_room() -> None:
    """A worker can start though every tenant is within its quota and the pool full."""
    pool = Pool(a=0.5, b=0.5)
    pool.store("a", 5)
    pool.store("b", 5)

    assert len(pool.ledger.evict(1, CANARY_NAMESPACE)) == 1
    pool.ledger.check()


def test_shares_beyond_the_pool_are_refused() -> None:
    """Quotas can't add up to more than there is, nor be more than can be looked through."""
    many = [Account(str(idx), 0, LruPolicy()) for idx in range(TENANTS_MAX + 1)]

    with pytest.raises(ValueError, match="left=-1"):
        Accounts(NUM_SLOTS, LruPolicy(), [Account("a", NUM_SLOTS + 1, LruPolicy())])
    with pytest.raises(ValueError, match="tenants=65"):
        Accounts(NUM_SLOTS, LruPolicy(), many)
