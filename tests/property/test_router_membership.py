"""Whatever the sources say in whatever order, the fleet is what they want, less those who drain."""

from hypothesis import given
from hypothesis import strategies as st

from kvkeep.router.health.book import HealthBook, HealthSettings
from kvkeep.router.membership.member import Member
from kvkeep.router.membership.roster import SOURCES, Roster
from kvkeep.router.snapshot import Endpoint, EndpointState, Fleet

DRAIN_S = 10.0
members = st.builds(
    lambda name, port: Member(url=f"http://h:{port}", name=name),
    st.sampled_from("abc"),
    st.integers(1, 3),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("declare"), st.sampled_from(SOURCES), st.lists(members, max_size=3)),
        st.tuples(st.just("busy"), st.sampled_from("abc"), st.integers(0, 2)),
        st.tuples(st.just("wait"), st.just(""), st.integers(0, 12)),
    ),
    max_size=30,
)


class Heard:
    """A policy that knows who joined and has not left."""

    def __init__(self) -> None:
        self.present: list[Endpoint] = []

    def joined(self, endpoint: Endpoint) -> None:
        assert endpoint.name not in [other.name for other in self.present]
        self.present.append(endpoint)

    def left(self, endpoint: Endpoint) -> None:
        self.present.remove(endpoint)


def expected(wanted: dict[str, list[Member]]) -> dict[str, tuple[str, int]]:
    """What the sources want together, worked out slowly."""
    found: dict[str, tuple[str, int]] = {}
    for source in SOURCES:
        seen: set[str] = set()
        for member in wanted[source]:
            if member.title in seen:
                continue
            seen.add(member.title)
            if member.title not in found and member.address not in found.values():
                found[member.title] = member.address
    return found


@given(steps)
def test_the_fleet_is_what_the_sources_want(taken: list[tuple[str, str, object]]) -> None:
    """Each endpoint is wanted, or drains and still has requests; policies hear of each once."""
    fleet, heard = Fleet(), Heard()
    roster = Roster(fleet, HealthBook(fleet, HealthSettings()), [heard], DRAIN_S)
    wanted: dict[str, list[Member]] = {source: [] for source in SOURCES}
    now_s = 0.0
    for what, name, value in taken:
        if isinstance(value, list):
            wanted[name] = value
            roster.declare(name, value, now_s)
        elif what == "busy" and (endpoint := fleet.find(name)) is not None:
            assert isinstance(value, int)
            endpoint.num_in_flight = value
        elif isinstance(value, int):
            now_s += value
            roster.tick(now_s)
        want = expected(wanted)
        present = {endpoint.name: endpoint for endpoint in fleet}
        assert heard.present == list(fleet)
        for title, address in want.items():
            assert (present[title].host, present[title].port) == address
            assert present[title].state is not EndpointState.DRAINING
        for title in present.keys() - want.keys():
            assert roster.is_leaving(title)
            assert present[title].state is EndpointState.DRAINING
    roster.tick(now_s + DRAIN_S)

    assert {endpoint.name for endpoint in fleet} == expected(wanted).keys()
