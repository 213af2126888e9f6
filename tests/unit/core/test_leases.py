"""Leases by id, holder and deadline."""

from kvkeep.core.leases import LeaseTable, ReadLease
from kvkeep.model.ids import Holder, LeaseId

MINE, THEIRS = Holder(1, 10), Holder(2, 10)


def lease(lease_id: int, holder: Holder = MINE, deadline_s: float = 5.0) -> ReadLease:
    return ReadLease(LeaseId(lease_id), holder, [], deadline_s)


def table(*leases: ReadLease) -> LeaseTable[ReadLease]:
    made: LeaseTable[ReadLease] = LeaseTable()
    for each in leases:
        made.add(each)
    return made


def test_a_lease_is_found_by_its_holder_only() -> None:
    """A stranger who guesses an id, even from the same process, finds nothing."""
    leases = table(lease(1))

    assert leases.find(LeaseId(1), MINE) == lease(1)
    assert leases.find(LeaseId(1), THEIRS) is None
    assert leases.find(LeaseId(2), MINE) is None


def test_a_lease_is_over_at_its_deadline() -> None:
    """At the deadline itself a lease is over; the earlier granted comes first."""
    leases = table(lease(1, deadline_s=3.0), lease(2, deadline_s=9.0), lease(3, deadline_s=1.0))

    assert [each.lease_id for each in leases.expired(3.0)] == [1, 3]
    assert leases.expired(0.5) == []


def test_a_session_has_its_own_leases() -> None:
    """The leases of one session are not those of another of the same process."""
    leases = table(lease(1), lease(2, THEIRS), lease(3))

    assert [each.lease_id for each in leases.of_session(MINE)] == [1, 3]


def test_leases_may_end_while_they_are_looked_through() -> None:
    """Ending each lease in a loop over the table reaches all of them."""
    leases = table(lease(1), lease(2))
    for each in leases:
        leases.end(each)

    assert len(leases) == 0
