"""Whatever fails when: what is dead is soon left alone, and what lives is soon asked."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from kvkeep.router.health.book import HealthBook, HealthSettings, Outcome
from kvkeep.router.snapshot import Endpoint, EndpointState, Fleet, Role
from kvkeep.testing.virtual_time import VirtualTime

SETTINGS = HealthSettings(interval_s=2.0, timeout_s=1.0, failures_max=3, pause_s=4.0)
TICK_S = 0.1
WELL, DEAD, FROZEN, BROKEN = "well", "dead", "frozen", "broken"
ENDED = {WELL: Outcome.FINISHED, DEAD: Outcome.UNREACHABLE, BROKEN: Outcome.ERROR}
NOTICED_S = SETTINGS.failures_max * (SETTINGS.interval_s + SETTINGS.timeout_s + 2 * TICK_S)
"""Without any request: as many probes as it takes."""
BACK_S = SETTINGS.pause_s + 2 * (SETTINGS.interval_s + SETTINGS.timeout_s + 2 * TICK_S)


class World:
    """Endpoints whose condition changes, probes that take time, and perhaps requests."""

    def __init__(self, seed: int, count: int) -> None:
        self.time, self.chance = VirtualTime(), Random(seed)
        self.fleet = Fleet()
        self.book = HealthBook(self.fleet, SETTINGS)
        self.condition: dict[str, str] = {}
        self.since_s: dict[str, float] = {}
        self.on_probe: set[str] = set()
        for i in range(count):
            endpoint = Endpoint(f"e{i}", "127.0.0.1", i)
            self.fleet.join(endpoint)
            self.book.join(endpoint, 0.0)
            self.turn(endpoint.name, WELL)
        self.tick()

    def turn(self, name: str, condition: str) -> None:
        self.condition[name], self.since_s[name] = condition, self.time.now_s()

    def tick(self) -> None:
        for endpoint in self.book.due(self.time.now_s()):
            assert endpoint.name not in self.on_probe
            self.on_probe.add(endpoint.name)
            self.probe(endpoint, self.condition[endpoint.name])
        self.time.after(TICK_S, self.tick)

    def probe(self, endpoint: Endpoint, condition: str) -> None:
        outcome = ENDED.get(condition, Outcome.TIMEOUT)

        def end() -> None:
            self.on_probe.discard(endpoint.name)
            self.book.probed(endpoint, outcome, self.time.now_s())

        self.time.after(SETTINGS.timeout_s if condition == FROZEN else 0.01, end)

    def ask(self) -> None:
        """One request to any endpoint that may be chosen."""
        ready = self.fleet.ready(Role.SERVE, None)
        if not ready:
            return
        endpoint = self.chance.choice(ready)
        ticket = self.book.began(endpoint, self.time.now_s())

        def end() -> None:
            outcome = ENDED.get(self.condition[endpoint.name], Outcome.TIMEOUT)
            self.book.ended(endpoint, ticket, outcome, self.time.now_s())

        self.time.after(self.chance.choice([0.0, 0.5, 30.0]), end)

    def check(self, *, has_requests: bool) -> None:
        for endpoint in self.fleet:
            condition = self.condition[endpoint.name]
            for_s = self.time.now_s() - self.since_s[endpoint.name]
            if condition == WELL and for_s > BACK_S and not has_requests:
                assert endpoint.state is EndpointState.READY
            if condition != WELL and for_s > NOTICED_S:
                assert endpoint.state is EndpointState.DOWN
            if condition == DEAD and for_s > SETTINGS.interval_s + SETTINGS.timeout_s + 2 * TICK_S:
                assert endpoint.state is EndpointState.DOWN


@given(st.integers(0, 2**32), st.integers(1, 4), st.booleans())
def test_the_dead_are_left_alone_and_the_living_are_asked(
    seed: int, count: int, has_requests: bool
) -> None:
    """Bounds of both hold at every moment; a probe begins when the one before has ended."""
    world = World(seed, count)
    names = sorted(world.condition)
    for _ in range(60):
        world.time.run_until(world.time.now_s() + world.chance.choice([0.3, 3.0, 15.0]))
        world.check(has_requests=has_requests)
        if world.chance.random() < 0.5:
            world.turn(
                world.chance.choice(names), world.chance.choice([WELL, DEAD, FROZEN, BROKEN])
            )
        if has_requests:
            world.ask()
    for name in names:
        world.turn(name, WELL)
    # Requests of before, which hung, have ended by then: nothing stays out of service for them.
    world.time.run_until(world.time.now_s() + 31.0 + BACK_S)

    assert len(world.fleet.ready(Role.SERVE, None)) == count
