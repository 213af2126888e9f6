"""Who may read or write which slots, and until when."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvkeep.core.blocks import Slot
from kvkeep.model.ids import Holder, LeaseId


@dataclass(frozen=True, slots=True)
class ReadLease:
    """Blocks that stay where they are until the lease ends."""

    lease_id: LeaseId
    holder: Holder
    slots: Sequence[Slot]
    deadline_s: float
    is_use: bool = True
    """Whether it counts as a use of the blocks when it ends."""


@dataclass(frozen=True, slots=True)
class WriteLease:
    """Slots that one holder fills, its heads of each."""

    lease_id: LeaseId
    holder: Holder
    slots: Sequence[Slot]
    head_mask: int
    deadline_s: float


LeaseType = TypeVar("LeaseType", ReadLease, WriteLease)


class LeaseTable(Generic[LeaseType]):
    """Leases of one kind by id, and by holder's session."""

    def __init__(self) -> None:
        self._leases: dict[LeaseId, LeaseType] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def add(self, lease: LeaseType) -> None:
        """Begin a lease."""
        self._leases[lease.lease_id] = lease

    def find(self, lease_id: LeaseId, holder: Holder) -> LeaseType | None:
        """A lease that still runs, only for who holds it: a stranger's id is not found."""
        lease = self._leases.get(lease_id)
        return lease if lease is not None and lease.holder == holder else None

    def end(self, lease: LeaseType) -> None:
        """End a lease."""
        del self._leases[lease.lease_id]

    def expired(self, now_s: float) -> list[LeaseType]:
        """Leases past their deadline, in the order they were granted."""
        return [lease for lease in self._leases.values() if lease.deadline_s <= now_s]

    def of_session(self, holder: Holder) -> list[LeaseType]:
        """Leases of one session."""
        return [lease for lease in self._leases.values() if lease.holder == holder]

    def __iter__(self) -> Iterator[LeaseType]:
        return iter(list(self._leases.values()))
