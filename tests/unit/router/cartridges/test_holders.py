"""Who is asked for a cartridge: whoever has it, unless they are too busy."""

from kvkeep.router.cartridges.holders import Holders
from kvkeep.router.snapshot import Endpoint, EndpointState

SHIPS = frozenset({"ships"})
NOTHING: frozenset[str] = frozenset()


def fleet(num_endpoints: int = 3) -> tuple[Endpoint, ...]:
    return tuple(
        Endpoint(name, "127.0.0.1", 1, state=EndpointState.READY) for name in "abc"[:num_endpoints]
    )


def names(endpoints: object) -> str:
    assert isinstance(endpoints, tuple)
    return "".join(endpoint.name for endpoint in endpoints)


def test_whoever_has_it_is_asked() -> None:
    """Of three engines the two that say so."""
    holders, ready = Holders(), fleet()
    for name, resident in (("a", NOTHING), ("b", SHIPS), ("c", SHIPS)):
        holders.tell(name, resident)
    group, told = holders.narrow("ships", ready)

    assert (names(group), told) == ("bc", "resident")


def test_it_is_the_same_tuple_until_something_changes() -> None:
    """Policies keep what they worked out for a group of engines."""
    holders, ready = Holders(), fleet()
    holders.tell("a", SHIPS)
    first, _ = holders.narrow("ships", ready)
    holders.tell("a", SHIPS)
    second, _ = holders.narrow("ships", ready)
    holders.tell("b", SHIPS)

    assert first is second
    assert names(holders.narrow("ships", ready)[0]) == "ab"


def test_if_nobody_has_it_all_are_asked() -> None:
    """One of them loads it."""
    holders, ready = Holders(), fleet()
    holders.tell("a", NOTHING)

    assert holders.narrow("ships", ready) == (ready, "nowhere")


def test_if_nobody_says_all_are_asked() -> None:
    """A fleet without pages is routed as if there were no cartridges."""
    ready = fleet()

    assert Holders().narrow("ships", ready) == (ready, "untold")


def test_who_is_not_ready_does_not_count() -> None:
    """An engine that has it and is down is not waited for."""
    holders, ready = Holders(), fleet()
    holders.tell("c", SHIPS)
    holders.tell("a", NOTHING)

    assert holders.narrow("ships", ready[:2]) == (ready[:2], "nowhere")


def test_a_busy_holder_is_passed_over() -> None:
    """Another loads what many ask for; of two holders the one with room is asked."""
    holders, ready = Holders(), fleet()
    holders.tell("a", SHIPS)
    holders.tell("b", NOTHING)
    ready[0].num_in_flight = 20
    alone = holders.narrow("ships", ready)
    holders.tell("b", SHIPS)
    group, told = holders.narrow("ships", ready)

    assert alone == (ready, "busy")
    assert (names(group), told) == ("b", "resident")


def test_who_says_nothing_any_more_is_forgotten() -> None:
    """A page that can't be read, and an engine that left."""
    holders, ready = Holders(), fleet()
    for name in "ab":
        holders.tell(name, SHIPS)
    holders.tell("a", None)
    holders.tell("a", None)
    assert names(holders.narrow("ships", ready)[0]) == "b"
    holders.keep_only(frozenset({"a", "c"}))

    assert holders.resident_at("b") is None
    assert holders.narrow("ships", ready) == (ready, "untold")
