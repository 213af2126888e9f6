"""Who stays within a budget, who goes, and what was counted."""

import pytest

from kvkeep.cartridges.residency.resident_set import ResidentSet
from kvkeep.model.errors import CapacityError, InvariantError

SIZE = 100


def use(resident: ResidentSet, name: str, num_bytes: int = SIZE) -> int:
    """Acquire, and load what is due; returns the reference."""
    acquired = resident.acquire(name, num_bytes)
    if acquired.is_load_due:
        resident.loaded(name)
    resident.check()
    return acquired.reference


def use_once(resident: ResidentSet, *names: str) -> None:
    for name in names:
        assert resident.release(name, use(resident, name))


def test_nothing_is_resident_before_it_is_asked_for() -> None:
    """A hundred registered cartridges cost no memory."""
    resident = ResidentSet(5 * SIZE)

    assert resident.resident_ids() == []
    assert resident.resident_bytes == resident.taken_bytes == 0


def test_only_what_was_served_is_resident() -> None:
    """Of many, those that requests asked for."""
    resident = ResidentSet(5 * SIZE)
    use_once(resident, "2", "5", "7")

    assert resident.resident_ids() == ["2", "5", "7"]


def test_the_first_use_loads() -> None:
    """It is a miss, and one promotion of so many bytes."""
    resident = ResidentSet(10 * SIZE)
    acquired = resident.acquire("a", SIZE)

    assert (acquired.is_resident, acquired.is_load_due) == (False, True)
    assert not resident.is_resident("a")
    assert resident.is_loading("a")
    resident.loaded("a")
    assert resident.is_resident("a")
    assert not resident.is_loading("a")
    metrics = resident.metrics
    assert (metrics.misses, metrics.hits, metrics.promoted) == (1, 0, 1)
    assert metrics.bytes_promoted == resident.resident_bytes == SIZE


def test_the_second_use_hits() -> None:
    """Nothing is loaded again."""
    resident = ResidentSet(10 * SIZE)
    use_once(resident, "a")
    acquired = resident.acquire("a", SIZE)

    assert (acquired.is_resident, acquired.is_load_due) == (True, False)
    metrics = resident.metrics
    assert (metrics.misses, metrics.hits, metrics.promoted) == (1, 1, 1)
    assert metrics.bytes_promoted == SIZE


def test_two_that_ask_at_once_load_once() -> None:
    """The second waits for the load of the first."""
    resident = ResidentSet(10 * SIZE)
    first, second = resident.acquire("a", SIZE), resident.acquire("a", SIZE)

    assert (first.is_load_due, second.is_load_due) == (True, False)
    assert not second.is_resident
    assert resident.num_references("a") == 2
    assert resident.metrics.misses == 2
    resident.loaded("a")
    resident.check()
    assert resident.metrics.promoted == 1


def test_references_are_counted() -> None:
    """Two uses need two releases, and each counts once."""
    resident = ResidentSet(10 * SIZE)
    first, second = use(resident, "a"), use(resident, "a")

    assert resident.num_references("a") == 2
    assert resident.release("a", first)
    assert not resident.release("a", first)
    assert resident.num_references("a") == 1
    assert resident.release("a", second)
    assert resident.num_references("a") == 0


def test_releasing_what_is_not_there_is_no_error() -> None:
    """It says so and changes nothing."""
    assert not ResidentSet(SIZE).release("never", 1)


def test_what_is_used_is_not_evicted() -> None:
    """Another that does not fit beside it is refused, and nothing changes."""
    resident = ResidentSet(SIZE * 3 // 2)
    use(resident, "a")

    with pytest.raises(CapacityError, match="b cannot fit: 100 of 150 bytes are taken"):
        resident.acquire("b", SIZE)
    assert resident.resident_ids() == ["a"]
    assert resident.metrics.refused == 1
    resident.check()


def test_what_is_loading_is_not_evicted() -> None:
    """Its bytes are on their way into that room."""
    resident = ResidentSet(SIZE * 3 // 2)
    acquired = resident.acquire("a", SIZE)
    resident.release("a", acquired.reference)

    with pytest.raises(CapacityError):
        resident.acquire("b", SIZE)
    assert not resident.evict("a", force=True)


def test_what_nobody_uses_makes_room() -> None:
    """Only when its room is needed."""
    resident = ResidentSet(SIZE * 3 // 2)
    use_once(resident, "a")
    acquired = resident.acquire("b", SIZE)

    assert acquired.evicted == ("a",)
    resident.loaded("b")
    assert resident.resident_ids() == ["b"]
    assert (resident.metrics.evicted, resident.metrics.bytes_evicted) == (1, SIZE)


def test_the_least_recently_used_goes_first() -> None:
    """By last use, not by when it came."""
    resident = ResidentSet(2 * SIZE)
    use_once(resident, "a", "b", "a")

    assert resident.resident_ids() == ["b", "a"]
    use_once(resident, "c")
    assert resident.resident_ids() == ["a", "c"]


def test_no_more_goes_than_has_to() -> None:
    """A small one makes one other leave; a large one several, in their order."""
    resident = ResidentSet(4 * SIZE)
    use_once(resident, "a", "b", "c", "d")

    assert resident.acquire("e", SIZE).evicted == ("a",)
    assert resident.acquire("f", 2 * SIZE).evicted == ("b", "c")


def test_what_was_evicted_comes_back() -> None:
    """As a new promotion."""
    resident = ResidentSet(SIZE)
    use_once(resident, "a", "b", "a")

    assert resident.resident_ids() == ["a"]
    assert (resident.metrics.promoted, resident.metrics.evicted) == (3, 2)


def test_an_older_one_that_is_used_is_passed_over() -> None:
    """The next one that may go, goes."""
    resident = ResidentSet(2 * SIZE)
    use(resident, "a")
    use_once(resident, "b", "c")

    assert resident.resident_ids() == ["a", "c"]


def test_if_all_are_used_nothing_is_evicted() -> None:
    """No partial state: a refusal changes nothing."""
    resident = ResidentSet(3 * SIZE)
    use_once(resident, "idle")
    use(resident, "a")
    use(resident, "b")

    with pytest.raises(CapacityError, match="cannot fit"):
        resident.acquire("c", 2 * SIZE)
    assert resident.resident_ids() == ["idle", "a", "b"]
    assert resident.metrics.evicted == 0


def test_what_is_larger_than_the_budget_never_fits() -> None:
    """It is said so, and nothing is thrown out for it."""
    resident = ResidentSet(SIZE // 2)

    with pytest.raises(CapacityError, match="it will never fit, raise the budget"):
        resident.acquire("a", SIZE)
    assert resident.prefetch("a", SIZE) is None


def test_a_budget_of_nothing_takes_nothing() -> None:
    """As settings may say."""
    with pytest.raises(CapacityError):
        ResidentSet(0).acquire("a", 1)


def test_what_is_pinned_stays() -> None:
    """Until it is unpinned, whoever needs room; what is absent can't be pinned."""
    resident = ResidentSet(SIZE)
    use_once(resident, "a")

    assert resident.pin("a")
    assert not resident.pin("absent")
    with pytest.raises(CapacityError):
        resident.acquire("b", SIZE)
    assert not resident.evict("a")
    assert resident.unpin("a")
    assert not resident.unpin("absent")
    assert resident.evict("a")


def test_eviction_on_request_respects_use_unless_forced() -> None:
    """Forced, it ends the references, and a late release is no harm to the next user."""
    resident = ResidentSet(SIZE)
    old = use(resident, "a")

    assert not resident.evict("a")
    assert resident.evict("a", force=True)
    assert not resident.evict("a")
    new = use(resident, "a")
    assert not resident.release("a", old)
    assert resident.num_references("a") == 1
    assert resident.release("a", new)
    resident.check()


def test_a_prefetch_loads_without_using() -> None:
    """The next request finds it resident, and it is not held meanwhile."""
    resident = ResidentSet(SIZE)
    prefetched = resident.prefetch("a", SIZE)

    assert prefetched is not None
    assert prefetched.is_load_due
    resident.loaded("a")
    assert resident.num_references("a") == 0
    assert resident.acquire("a", SIZE).is_resident
    assert (resident.metrics.hits, resident.metrics.misses) == (1, 0)
    assert resident.metrics.prefetched == 1


def test_a_prefetch_of_what_is_there_does_nothing() -> None:
    """Nothing is loaded twice, nor while it is on its way."""
    resident = ResidentSet(SIZE)
    resident.acquire("a", SIZE)

    for _ in range(2):
        prefetched = resident.prefetch("a", SIZE)
        assert prefetched is not None
        assert not prefetched.is_load_due
        if resident.is_loading("a"):
            resident.loaded("a")


def test_a_prefetch_never_takes_room_from_what_is_used() -> None:
    """It backs off without an error."""
    resident = ResidentSet(SIZE * 3 // 2)
    use(resident, "a")

    assert resident.prefetch("b", SIZE) is None
    assert resident.resident_ids() == ["a"]


def test_a_load_that_fails_leaves_nothing() -> None:
    """Its room is free, whoever waited is told how many they were, and a retry is new."""
    resident = ResidentSet(SIZE)
    first = resident.acquire("a", SIZE)
    resident.acquire("a", SIZE)

    assert resident.failed("a") == 2
    assert resident.taken_bytes == 0
    assert not resident.release("a", first.reference)
    assert resident.metrics.failed == 1
    assert resident.metrics.promoted == 0
    assert resident.acquire("a", SIZE).is_load_due
    resident.check()


@pytest.mark.parametrize("told", [ResidentSet.loaded, ResidentSet.failed])
def test_news_of_a_load_that_nobody_began_is_a_defect(told: object) -> None:
    """Whoever says so has lost count."""
    assert callable(told)
    with pytest.raises(InvariantError, match="was not being loaded"):
        told(ResidentSet(SIZE), "a")


def test_a_contradiction_is_noticed() -> None:
    """What was counted is compared with what is there."""
    resident = ResidentSet(SIZE)
    use_once(resident, "a")
    resident.metrics.evicted += 1

    with pytest.raises(InvariantError, match="promoted - evicted is 0, not 1"):
        resident.check()


def test_counters_have_names() -> None:
    """As a page of metrics shows them."""
    resident = ResidentSet(SIZE)
    use_once(resident, "a", "b")

    assert resident.metrics.snapshot() == {
        "hits": 0, "misses": 2, "refused": 0, "promoted": 2, "prefetched": 0, "evicted": 1,
        "failed": 0, "bytes_promoted": 2 * SIZE, "bytes_evicted": SIZE,
    }  # fmt: skip
