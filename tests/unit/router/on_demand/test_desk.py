"""Requests that wait for engines, with a starter that only writes down what it is told."""

from collections.abc import Callable
from typing import Literal

import pytest

from kvkeep.router.health.book import HealthBook, HealthSettings, Outcome
from kvkeep.router.membership.roster import Roster
from kvkeep.router.on_demand.desk import REST_S, STARTS_MAX, WAITING_MAX, StartDesk, StartRefusal
from kvkeep.router.on_demand.starter import OnDemandMember, StartNews, StartState
from kvkeep.router.snapshot import Endpoint, Fleet

IDLE_S, WAIT_S = 60.0, 20.0


class Scene:
    """A desk with one engine ``e`` for the model ``m``, and what came of its requests."""

    def __init__(self, *more: OnDemandMember) -> None:
        self.fleet = Fleet()
        self.book = HealthBook(self.fleet, HealthSettings())
        self.roster = Roster(self.fleet, self.book, [], drain_s=5.0)
        self.orders: list[tuple[str, str]] = []
        self.answers: list[StartRefusal | None] = []
        self.now_s = 0.0
        self.desk = StartDesk([member("e", "m"), *more], self.fleet, self.roster, self)

    def start(self, name: str) -> None:
        self.orders.append(("start", name))

    def stop(self, name: str) -> None:
        self.orders.append(("stop", name))

    async def run(self, told: Callable[[StartNews], None]) -> None:
        raise NotImplementedError

    def ask(self, model: str | None = "m") -> bool:
        """Whether a request waits, or was seen to in another way."""
        return self.desk.wait(model, self.now_s, self.answers.append) is not None

    def tell(self, state: StartState, text: str = "", name: str = "e") -> None:
        self.desk.told(StartNews(name, state, text), self.now_s)

    def tick(self, passed_s: float = 0.0) -> None:
        self.now_s += passed_s
        self.roster.tick(self.now_s)
        self.desk.tick(self.now_s)

    def become_ready(self, name: str = "e") -> Endpoint:
        """The engine has started, and a probe of it went well."""
        self.tell("ready", name=name)
        self.book.due(self.now_s)
        endpoint = self.fleet.find(name)
        assert endpoint is not None
        self.book.probed(endpoint, Outcome.FINISHED, self.now_s, frozenset({"m"}))
        return endpoint

    @property
    def phase(self) -> str:
        return str(self.desk.status()[0]["state"])


def member(name: str, *models: str) -> OnDemandMember:
    port = 1 + sum(name.encode())
    return OnDemandMember(
        url=f"http://127.0.0.1:{port}",
        name=name,
        models=list(models),
        idle_stop_s=IDLE_S,
        start_wait_s=WAIT_S,
    )


def test_many_first_requests_start_one_engine() -> None:
    """They all go on when it is there and was probed, and not before."""
    scene = Scene()
    waits = [scene.ask() for _ in range(5)]
    scene.tell("starting", "loading the model")
    scene.tick(1.0)
    scene.tell("ready")
    scene.tick(0.1)
    early = list(scene.answers)
    scene.become_ready()
    scene.tick(0.1)

    assert waits == [True] * 5
    assert early == []
    assert scene.answers == [None] * 5
    assert scene.orders == [("start", "e")]
    assert not scene.ask()  # it is there: nothing to wait for


@pytest.mark.parametrize("model", ["other", None])
def test_what_starts_on_demand_is_no_business_of_other_models(model: str | None) -> None:
    """A request for another model is routed as ever, and so is one for any where others run."""
    scene = Scene()
    scene.fleet.join(Endpoint("x", "127.0.0.1", 9))

    assert not scene.ask(model)
    assert scene.orders == []


def test_without_a_model_the_only_engine_is_meant() -> None:
    """A client that names none gets what there is."""
    scene = Scene()

    assert scene.ask(None)
    assert scene.orders == [("start", "e")]


def test_a_request_waits_no_longer_than_its_time() -> None:
    """It gets 503 and when to come again; the engine goes on starting for the next one."""
    scene = Scene()
    scene.ask()
    scene.tell("starting", "loading the model")
    scene.tick(WAIT_S - 0.1)
    early = list(scene.answers)
    scene.tick(0.2)

    (refusal,) = scene.answers
    assert early == []
    assert refusal is not None
    assert (refusal.status, refusal.retry_after_s > 0) == (503, True)
    assert "loading the model" in refusal.message
    assert scene.phase == "starting"


def test_a_start_that_fails_is_tried_again_a_bounded_number_of_times() -> None:
    """Then all are told why, and nobody starts it until it has rested."""
    scene = Scene()
    scene.ask()
    for _ in range(STARTS_MAX):
        assert scene.answers == []
        scene.tell("failed", "no memory")
    (first,) = scene.answers
    scene.tick(REST_S / 2)
    scene.ask()
    scene.tick(REST_S / 2 + 0.1)
    scene.ask()

    assert first is not None
    assert "no memory" in first.message
    assert len(scene.answers) == 2
    assert scene.answers[1] is not None
    assert scene.answers[1].retry_after_s == REST_S / 2
    assert scene.orders == [("start", "e")] * (STARTS_MAX + 1)
    scene.tell("failed", "no memory")
    assert scene.phase == "resting"  # one attempt after a rest, not as many as at first


def test_a_start_for_nobody_is_not_tried_again() -> None:
    """A client that left needs no second attempt."""
    scene = Scene()
    waiting = scene.desk.wait("m", 0.0, scene.answers.append)
    assert waiting is not None
    scene.desk.leave(waiting)
    scene.tell("failed", "no memory")
    scene.tick(WAIT_S * 2)

    assert scene.orders == [("start", "e")]
    assert scene.answers == []


def test_an_idle_engine_is_stopped_and_no_sooner() -> None:
    """Before it is stopped it is out of the fleet, so that nothing can be on its way to it."""
    scene = Scene()
    scene.ask()
    scene.become_ready()
    scene.tick(0.1)
    scene.tick(IDLE_S - 0.2)
    before = list(scene.orders)
    scene.tick(0.3)

    assert before == [("start", "e")]
    assert scene.orders[-1] == ("stop", "e")
    assert scene.fleet.find("e") is None
    assert scene.phase == "stopping"


def test_an_engine_with_requests_is_not_stopped() -> None:
    """Neither while one runs, however long, nor right after it."""
    scene = Scene()
    endpoint = scene.become_ready()
    endpoint.num_in_flight = 1
    for _ in range(5):
        scene.tick(IDLE_S)
    endpoint.num_in_flight, endpoint.traffic.num_done = 0, 1
    scene.tick(IDLE_S - 0.1)
    endpoint.traffic.num_done = 2  # one that began and ended between two looks
    scene.tick(0.2)
    scene.tick(IDLE_S - 0.1)

    assert scene.orders == []
    scene.tick(0.2)
    assert scene.orders == [("stop", "e")]


def test_a_request_for_an_engine_that_stops_has_it_started_again() -> None:
    """It waits for the end first, for there is one engine and one port."""
    scene = Scene()
    scene.become_ready()
    scene.tick(0.1)
    scene.tick(IDLE_S + 0.1)
    scene.ask()
    before = list(scene.orders)
    scene.tell("stopped")

    assert before == [("stop", "e")]
    assert scene.orders == [("stop", "e"), ("start", "e")]


def test_an_engine_that_ends_by_itself_leaves_the_fleet() -> None:
    """The next request starts it."""
    scene = Scene()
    scene.become_ready()
    scene.tell("stopped", "it was killed")
    left = scene.fleet.find("e") is None
    scene.ask()

    assert left
    assert scene.orders == [("start", "e")]


def test_orders_that_nobody_heard_are_given_again() -> None:
    """A supervisor that comes back says what is, and hears what is wanted."""
    scene = Scene()
    scene.ask()
    scene.tell("stopped")
    scene.become_ready()
    scene.tick(0.1)
    scene.tick(IDLE_S + 0.1)
    scene.tell("ready")

    assert scene.orders == [("start", "e")] * 2 + [("stop", "e")] * 2
    assert scene.answers == [None]


def test_a_router_that_was_restarted_takes_over_what_runs() -> None:
    """An engine that is there needs no start, and stops when it is idle as ever."""
    scene = Scene()
    scene.become_ready()
    is_waiting = scene.ask()
    scene.tick(0.1)
    scene.tick(IDLE_S + 0.1)

    assert not is_waiting
    assert scene.orders == [("stop", "e")]


def test_no_more_wait_than_there_is_room_for() -> None:
    """Who is one too many is told at once."""
    scene = Scene()
    for _ in range(WAITING_MAX + 1):
        scene.ask()

    (refusal,) = scene.answers
    assert refusal is not None
    assert refusal.status == 503
    assert scene.desk.num_waiting == WAITING_MAX


def test_a_router_that_stops_keeps_nobody_waiting() -> None:
    """They are refused, nobody is started any more, and no idle engine is stopped for it."""
    scene = Scene()
    scene.ask()
    scene.desk.drain()
    is_waiting = scene.ask()
    scene.become_ready()
    scene.tick(0.1)
    scene.tick(2 * IDLE_S)

    assert [each is not None and each.status for each in scene.answers] == [503]
    assert scene.orders == [("start", "e")]
    assert not is_waiting


def test_an_engine_that_was_removed_by_hand_is_there_again() -> None:
    """Whoever takes it out over the API does not make its model unavailable."""
    scene = Scene()
    scene.become_ready()
    scene.roster.remove("e", scene.now_s)
    scene.tick(0.1)

    assert scene.fleet.find("e") is not None


State = Literal["starting", "ready", "stopped", "failed"]


@pytest.mark.parametrize("state", ["starting", "ready", "stopped", "failed"])
def test_news_of_strangers_change_nothing(state: State) -> None:
    """An engine that the settings do not name is somebody else's."""
    scene = Scene()
    scene.tell(state, name="x")

    assert scene.phase == "stopped"
    assert len(scene.fleet) == 0
