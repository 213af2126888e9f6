"""Who joins and leaves by example; tests/property/test_router_membership.py has the promises."""

import pytest

from kvkeep.model.errors import InputError, RefusedError
from kvkeep.router.health.book import HealthBook, HealthSettings
from kvkeep.router.membership.member import Member
from kvkeep.router.membership.roster import API, ETCD, FILE, STATIC, Roster
from kvkeep.router.snapshot import Endpoint, EndpointState, Fleet, Role


class Fixture:
    """A roster, its fleet, and what a policy heard."""

    def __init__(self) -> None:
        self.fleet = Fleet()
        self.heard: list[str] = []
        book = HealthBook(self.fleet, HealthSettings())
        self.roster = Roster(self.fleet, book, [self], drain_s=30.0)

    def joined(self, endpoint: Endpoint) -> None:
        self.heard.append(f"+{endpoint.name}")

    def left(self, endpoint: Endpoint) -> None:
        self.heard.append(f"-{endpoint.name}")

    def endpoint(self, name: str) -> Endpoint:
        found = self.fleet.find(name)
        assert found is not None
        return found

    def names(self) -> list[str]:
        return [endpoint.name for endpoint in self.fleet]


def member(name: str, port: int = 1, role: Role = Role.SERVE) -> Member:
    return Member(url=f"http://{name}:{port}", name=name, role=role)


@pytest.fixture
def scene() -> Fixture:
    return Fixture()


def test_saying_the_same_again_changes_nothing(scene: Fixture) -> None:
    """Sources say all they want as often as they like."""
    for now_s in range(3):
        scene.roster.declare(FILE, [member("a"), member("b")], float(now_s))
    version = scene.fleet.version
    scene.roster.declare(FILE, [member("b"), member("a")], 4.0)

    assert scene.heard == ["+a", "+b"]
    assert scene.fleet.version == version


def test_an_endpoint_that_leaves_drains(scene: Fixture) -> None:
    """It is asked no more, and goes when its last request has ended."""
    scene.roster.declare(FILE, [member("a")], 0.0)
    endpoint = scene.endpoint("a")
    endpoint.num_in_flight = 1
    scene.roster.declare(FILE, [], 1.0)
    assert (scene.names(), endpoint.state) == (["a"], EndpointState.DRAINING)
    scene.roster.tick(2.0)
    assert scene.names() == ["a"]
    endpoint.num_in_flight = 0
    scene.roster.tick(3.0)

    assert (scene.names(), scene.heard) == ([], ["+a", "-a"])


def test_an_endpoint_that_never_gets_idle_goes_in_the_end(scene: Fixture) -> None:
    """Draining has a limit."""
    scene.roster.declare(FILE, [member("a")], 0.0)
    scene.endpoint("a").num_in_flight = 1
    scene.roster.declare(FILE, [], 1.0)
    scene.roster.tick(30.9)
    assert scene.names() == ["a"]
    scene.roster.tick(31.0)

    assert scene.names() == []


def test_an_endpoint_named_again_stays(scene: Fixture) -> None:
    """With its counters: it is the same engine."""
    scene.roster.declare(FILE, [member("a")], 0.0)
    endpoint = scene.endpoint("a")
    endpoint.num_in_flight = 1
    scene.roster.declare(FILE, [], 1.0)
    scene.roster.declare(FILE, [member("a")], 2.0)
    scene.roster.tick(100.0)

    assert scene.endpoint("a") is endpoint
    assert endpoint.state is EndpointState.JOINING


def test_an_endpoint_stays_while_any_source_names_it(scene: Fixture) -> None:
    """Two sources may overlap."""
    scene.roster.declare(FILE, [member("a")], 0.0)
    scene.roster.declare(ETCD, [member("a")], 0.0)
    scene.roster.declare(FILE, [], 1.0)
    assert scene.names() == ["a"]
    scene.roster.declare(ETCD, [], 2.0)

    assert scene.names() == []


def test_a_new_address_is_a_new_engine(scene: Fixture) -> None:
    """Nothing that was known of the old one counts; what runs there ends by itself."""
    scene.roster.declare(FILE, [member("a", 1)], 0.0)
    old = scene.endpoint("a")
    scene.roster.declare(FILE, [member("a", 2)], 1.0)

    assert scene.endpoint("a") is not old
    assert scene.endpoint("a").port == 2
    assert scene.heard == ["+a", "-a", "+a"]


def test_one_address_is_one_endpoint(scene: Fixture) -> None:
    """Under two names it would get twice its share."""
    scene.roster.declare(STATIC, [Member(url="http://h:1", name="x")], 0.0)
    scene.roster.declare(ETCD, [Member(url="http://h:1", name="y")], 0.0)

    assert scene.names() == ["x"]


def test_a_weight_may_change(scene: Fixture) -> None:
    """Without a new endpoint."""
    scene.roster.declare(FILE, [Member(url="http://a:1", name="a")], 0.0)
    scene.roster.declare(FILE, [Member(url="http://a:1", name="a", weight=3.0)], 1.0)

    assert scene.endpoint("a").weight == 3.0
    assert scene.heard == ["+a"]


def test_joining_twice_is_joining(scene: Fixture) -> None:
    """Over the API too."""
    assert scene.roster.add(member("a"), 0.0)
    assert not scene.roster.add(member("a"), 1.0)
    assert scene.names() == ["a"]


@pytest.mark.parametrize(
    "other",
    [
        Member(url="http://b:2", name="a"),
        Member(url="http://a:1", name="b"),
        Member(url="http://a:1", name="a", role=Role.PREFILL),
    ],
)
def test_a_name_and_an_address_belong_together(scene: Fixture, other: Member) -> None:
    """An engine that claims another one's is refused, and nothing changes."""
    scene.roster.declare(FILE, [member("a")], 0.0)
    with pytest.raises(RefusedError):
        scene.roster.add(other, 1.0)

    assert scene.names() == ["a"]
    assert scene.roster.sources_of("b") == []


def test_leaving_twice_is_leaving(scene: Fixture) -> None:
    """Over the API, of what joined there or was named at the start."""
    scene.roster.declare(STATIC, [member("s")], 0.0)
    scene.roster.add(member("a"), 0.0)
    found = [scene.roster.remove(name, 1.0) for name in ("a", "a", "s", "s")]

    assert found == [True, False, True, False]
    assert scene.names() == []


def test_what_a_file_names_leaves_there(scene: Fixture) -> None:
    """It would be back with the file's next version."""
    scene.roster.declare(FILE, [member("a")], 0.0)
    with pytest.raises(RefusedError, match="take it out there"):
        scene.roster.remove("a", 1.0)

    assert scene.names() == ["a"]


def test_a_drained_endpoint_stays_in_the_fleet(scene: Fixture) -> None:
    """Out of service until a person puts it back, whatever its sources say meanwhile."""
    scene.roster.declare(FILE, [member("a")], 0.0)
    scene.roster.drain("a", is_draining=True)
    scene.endpoint("a").num_in_flight = 1
    scene.roster.declare(FILE, [], 1.0)
    scene.roster.declare(FILE, [member("a")], 2.0)
    scene.roster.tick(100.0)
    assert scene.endpoint("a").state is EndpointState.DRAINING
    scene.roster.drain("a", is_draining=False)

    assert scene.endpoint("a").state is EndpointState.JOINING


def test_an_endpoint_that_leaves_is_not_put_back_by_hand(scene: Fixture) -> None:
    """Its sources decide that."""
    scene.roster.declare(FILE, [member("a")], 0.0)
    scene.endpoint("a").num_in_flight = 1
    scene.roster.declare(FILE, [], 1.0)
    scene.roster.drain("a", is_draining=False)

    assert scene.endpoint("a").state is EndpointState.DRAINING


def test_nobody_drains_what_is_not_there(scene: Fixture) -> None:
    """The sentence says where to look."""
    with pytest.raises(InputError, match="GET /workers"):
        scene.roster.drain("a", is_draining=True)


def test_too_many_are_refused(scene: Fixture) -> None:
    """The fleet has a limit."""
    scene.roster.declare(API, [Member(url=f"http://h:{n}") for n in range(1, 1025)], 0.0)
    with pytest.raises(InputError):
        scene.roster.add(member("a"), 0.0)

    assert len(scene.roster.sources_of("h:1")) == 1
    assert scene.roster.sources_of("h:1") == [API]
