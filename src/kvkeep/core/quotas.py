"""Whose blocks make room: tenants' quotas of one pool.

Every slot of a pool is somebody's quota: each tenant that was given a share has that, and all
others together have the rest. A quota is what a tenant can count on, not a limit:

* free room is anyone's, so a tenant alone may fill the pool;
* a tenant within its quota gets its room from those who are over theirs, the most over first;
* beyond its quota a tenant makes room among its own blocks;
* so nobody's block goes for another tenant's while its tenant is within its quota.

Keeping count costs O(1) a block; finding whose blocks go costs O(tenants) a store that needs room.
"""

from collections.abc import Callable, Mapping, Sequence

from kvkeep.core.eviction.base import EvictionPolicy
from kvkeep.core.eviction.lru import LruPolicy
from kvkeep.model.ids import CANARY_NAMESPACE, Namespace
from kvkeep.model.tenant import TAG_BYTES, tag_of

TENANTS_MAX = 64
"""With a share of their own."""
OTHERS = "others"
"""Name of the account of all tenants without a share of their own."""


class Account:
    """What one tenant holds of a pool; only the ledger changes it."""

    __slots__ = ("name", "num_held", "policy", "quota")

    def __init__(self, name: str, quota: int, policy: EvictionPolicy) -> None:
        """Hold nothing.

        Args:
            name: Of the tenant, or ``OTHERS``.
            quota: Slots, at least 0.
            policy: Of this account alone; knows its READY slots.
        """
        self.name = name
        self.quota = quota
        self.policy = policy
        self.num_held = 0
        """Blocks in the index: being written or READY."""

    @property
    def num_over(self) -> int:
        """Blocks beyond the quota, which others may have the room of; negative within it."""
        return self.num_held - self.quota


def make_accounts(
    num_slots: int, shares: Mapping[str, float], new_policy: Callable[[int], EvictionPolicy]
) -> list[Account]:
    """Accounts of the tenants that have a share.

    Args:
        num_slots: Of the pool.
        shares: Of the pool by tenant, 0 to 1; together at most 1.
        new_policy: Given the number of slots of the pool, makes what orders eviction.
    """
    return [
        Account(name, int(share * num_slots), new_policy(num_slots))
        for name, share in sorted(shares.items())
    ]


class Accounts:
    """All accounts of one pool.

    Invariants: the quotas of tenants and others add up to the slots; every block in the index is
    held by exactly one account, that of its namespace.
    """

    def __init__(
        self, num_slots: int, policy: EvictionPolicy, tenants: Sequence[Account] = ()
    ) -> None:
        """Take the tenants' accounts; ``policy`` orders the blocks of all others."""
        num_left = num_slots - sum(account.quota for account in tenants)
        if num_left < 0 or len(tenants) > TENANTS_MAX:
            raise ValueError(f"shares don't fit the pool. tenants={len(tenants)} left={num_left}")
        self.others = Account(OTHERS, num_left, policy)
        self.tenants = tuple(tenants)
        self._canaries = Account("canaries", num_slots, LruPolicy())
        """Held while a worker runs, never READY, and owed to it whoever fills the pool."""
        self._by_tag = {tag_of(account.name): account for account in tenants}

    @property
    def all(self) -> tuple[Account, ...]:
        """Every account, in an order that never changes."""
        return (*self.tenants, self.others, self._canaries)

    def find(self, namespace: Namespace) -> Account:
        """Who holds blocks of this namespace."""
        if namespace == CANARY_NAMESPACE:
            return self._canaries
        return self._by_tag.get(namespace[-TAG_BYTES:], self.others)

    def over_quota(self) -> list[Account]:
        """Whoever is over its quota, the most over first."""
        found = [account for account in self.all if account.num_over > 0]
        return sorted(found, key=lambda account: -account.num_over)

    def is_owed(self, account: Account) -> bool:
        """Whether it gets room from anyone, even from who is within its quota."""
        return account is self._canaries
