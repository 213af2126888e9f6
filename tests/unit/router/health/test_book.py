"""The health of endpoints by example; tests/property/test_router_health.py has the promises."""

import logging

import pytest

from kvkeep.router.health.book import HealthBook, HealthSettings, Outcome
from kvkeep.router.snapshot import Endpoint, EndpointState, Fleet, Role

SETTINGS = HealthSettings(interval_s=2.0, timeout_s=1.0, failures_max=3, pause_s=4.0)


class Scene:
    """One endpoint and its book."""

    def __init__(self, *, is_ready: bool = True, settings: HealthSettings = SETTINGS) -> None:
        self.fleet = Fleet()
        self.endpoint = Endpoint("a", "127.0.0.1", 1)
        self.book = HealthBook(self.fleet, settings)
        self.fleet.join(self.endpoint)
        self.book.join(self.endpoint, 0.0)
        if is_ready:
            self.probe(Outcome.FINISHED, 0.0)

    def probe(self, outcome: Outcome, now_s: float) -> bool:
        """Probe if that is due; whether it was."""
        due = self.book.due(now_s)
        for endpoint in due:
            self.book.probed(endpoint, outcome, now_s)
        return bool(due)

    def ask(self, outcome: Outcome, now_s: float) -> None:
        ticket = self.book.began(self.endpoint, now_s)
        self.book.ended(self.endpoint, ticket, outcome, now_s)

    def state(self) -> EndpointState:
        return self.endpoint.state

    @property
    def is_chosen(self) -> bool:
        return self.endpoint in self.fleet.ready(Role.SERVE, None)


def test_a_new_endpoint_is_asked_after_a_good_probe() -> None:
    """An engine that still loads its model takes no request, and is not held to be broken."""
    scene = Scene(is_ready=False)
    states = []
    for i in range(20):
        scene.probe(Outcome.UNREACHABLE, 2.0 * i)
        states.append(scene.state())

    assert set(states) == {EndpointState.JOINING}
    scene.probe(Outcome.FINISHED, 40.0)
    assert scene.state() is EndpointState.READY
    assert scene.is_chosen


def test_where_nobody_listens_nobody_is_sent() -> None:
    """One refused connection is enough, and it counts from that call on."""
    scene = Scene()
    scene.ask(Outcome.UNREACHABLE, 1.0)

    assert scene.state() is EndpointState.DOWN
    assert not scene.is_chosen


@pytest.mark.parametrize("outcome", [Outcome.ERROR, Outcome.TIMEOUT, Outcome.BROKEN])
def test_some_failures_in_a_row_are_enough(outcome: Outcome) -> None:
    """One may be bad luck; what succeeds in between begins the count anew."""
    scene = Scene()
    for each in (outcome, outcome, Outcome.FINISHED, outcome, outcome):
        scene.ask(each, 1.0)
    assert scene.state() is EndpointState.READY
    scene.ask(outcome, 1.0)

    assert scene.state() is EndpointState.DOWN


def test_clients_that_leave_say_nothing() -> None:
    """Whoever hangs up takes no endpoint out of service."""
    scene = Scene()
    for _ in range(10):
        scene.ask(Outcome.CLIENT_LEFT, 1.0)

    assert scene.state() is EndpointState.READY


def test_an_endpoint_comes_back_by_two_words() -> None:
    """After the pause a probe opens it to requests, and the first of these settles it."""
    scene = Scene()
    scene.ask(Outcome.UNREACHABLE, 1.0)
    assert not scene.probe(Outcome.FINISHED, 4.9)
    assert scene.probe(Outcome.FINISHED, 5.0)
    assert scene.state() is EndpointState.SUSPECT
    assert scene.is_chosen
    scene.ask(Outcome.FINISHED, 5.1)

    assert scene.state() is EndpointState.READY


def test_a_second_probe_settles_it_too() -> None:
    """Without requests it does not stay suspect."""
    scene = Scene()
    scene.ask(Outcome.UNREACHABLE, 1.0)
    scene.probe(Outcome.FINISHED, 5.0)
    scene.probe(Outcome.FINISHED, 7.0)

    assert scene.state() is EndpointState.READY


def test_a_suspect_that_fails_is_left_alone_at_once() -> None:
    """An engine whose probes are well and whose requests fail is not asked three times again."""
    scene = Scene()
    scene.ask(Outcome.UNREACHABLE, 1.0)
    scene.probe(Outcome.FINISHED, 5.0)
    scene.ask(Outcome.ERROR, 5.1)

    assert scene.state() is EndpointState.DOWN
    assert scene.book.num_trips("a") == 2


def test_a_probe_that_fails_begins_another_pause() -> None:
    """It is not probed all the time while it is down."""
    scene = Scene()
    scene.ask(Outcome.UNREACHABLE, 1.0)
    scene.probe(Outcome.TIMEOUT, 5.0)

    assert not scene.probe(Outcome.FINISHED, 8.9)
    assert scene.state() is EndpointState.DOWN
    assert scene.probe(Outcome.FINISHED, 9.0)


def test_an_endpoint_found_dead_between_probes_is_probed_after_its_pause() -> None:
    """However seldom those that are well are probed."""
    scene = Scene(settings=HealthSettings(interval_s=3600.0, pause_s=4.0))
    scene.ask(Outcome.UNREACHABLE, 1.0)
    assert scene.probe(Outcome.FINISHED, 5.0)
    assert scene.probe(Outcome.FINISHED, 9.0)

    assert scene.state() is EndpointState.READY


def test_what_began_before_says_nothing_of_now() -> None:
    """A request that hung since before the endpoint fell and came back does not count."""
    scene = Scene()
    old = scene.book.began(scene.endpoint, 0.5)
    scene.ask(Outcome.UNREACHABLE, 1.0)
    scene.probe(Outcome.FINISHED, 5.0)
    scene.book.ended(scene.endpoint, old, Outcome.TIMEOUT, 6.0)
    assert scene.state() is EndpointState.SUSPECT
    scene.probe(Outcome.FINISHED, 7.0)
    for _ in range(5):
        scene.book.ended(scene.endpoint, old, Outcome.TIMEOUT, 8.0)

    assert scene.state() is EndpointState.READY


def test_a_draining_endpoint_is_watched_and_not_asked() -> None:
    """Undone, it is at once what it would have been."""
    scene = Scene()
    scene.book.drain("a", is_draining=True)
    assert scene.state() is EndpointState.DRAINING
    scene.ask(Outcome.UNREACHABLE, 1.0)
    assert scene.state() is EndpointState.DRAINING
    scene.book.drain("a", is_draining=False)

    assert scene.state() is EndpointState.DOWN


def test_models_are_learned() -> None:
    """Requests for a model go only where it is, from the probe on that found it."""
    scene = Scene()
    (due,) = scene.book.due(2.0)
    scene.book.probed(due, Outcome.FINISHED, 2.0, frozenset({"m"}))

    assert scene.fleet.ready(Role.SERVE, "m") == (scene.endpoint,)
    assert scene.fleet.ready(Role.SERVE, "other") == ()


def test_one_that_left_is_not_heard() -> None:
    """Its probe and its requests may still end; its successor of that name is another."""
    scene = Scene()
    (due,) = scene.book.due(2.0)
    ticket = scene.book.began(scene.endpoint, 2.0)
    scene.fleet.leave("a")
    scene.book.leave("a")
    heir = Endpoint("a", "127.0.0.1", 2)
    scene.fleet.join(heir)
    scene.book.join(heir, 3.0)
    scene.book.probed(due, Outcome.FINISHED, 3.0)
    assert heir.state is EndpointState.JOINING
    (again,) = scene.book.due(3.0)
    scene.book.probed(again, Outcome.FINISHED, 3.0)
    scene.book.ended(due, ticket, Outcome.UNREACHABLE, 3.0)

    assert scene.fleet.ready(Role.SERVE, None) == (heir,)
    assert scene.book.began(Endpoint("b", "127.0.0.1", 3), 3.0) == -1


def test_each_change_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Down and back, with the endpoint's name and why; what changes nothing says nothing."""
    caplog.set_level(logging.INFO, logger="kvkeep.router.health.book")
    scene = Scene()
    scene.ask(Outcome.UNREACHABLE, 1.0)
    scene.ask(Outcome.UNREACHABLE, 1.1)
    scene.probe(Outcome.TIMEOUT, 5.0)
    scene.probe(Outcome.FINISHED, 9.0)
    scene.ask(Outcome.FINISHED, 9.1)
    scene.ask(Outcome.FINISHED, 9.2)

    assert scene.state() is EndpointState.READY
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "an endpoint is ready. name=a reason=a probe went well"),
        ("WARNING", "an endpoint is down. name=a reason=a request found it: unreachable"),
        ("INFO", "an endpoint is back. name=a state=suspect reason=a probe went well"),
    ]
