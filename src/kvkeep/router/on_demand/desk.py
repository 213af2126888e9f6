"""Requests that wait for engines which are not there yet, and the life of these engines. Pure.

Told of requests, of time and of what the `Starter` says; answers by calling back. An engine is

    STOPPED  -- a request comes ------------> STARTING
    STARTING -- it answers -----------------> READY
    STARTING -- it can't be started --------> STARTING once more, then RESTING
    RESTING  -- ``REST_S`` are over --------> STOPPED: the next request has it tried again
    READY    -- idle for ``idle_stop_s`` ---> STOPPING: it is asked nothing any more
    STOPPING -- it is gone -----------------> STOPPED

and one that ends by itself is STOPPED. An engine with a request in flight is never stopped.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import ceil
from typing import Any

from kvkeep.model.errors import KvkeepError
from kvkeep.router.membership.roster import Roster
from kvkeep.router.on_demand.starter import OnDemandMember, Starter, StartNews
from kvkeep.router.snapshot import Fleet, Role

STARTS_MAX = 2
"""Attempts to start an engine before it is left alone for a while."""
REST_S = 30.0
WAITING_MAX = 256
"""Requests that wait for one engine; each holds a connection and its body."""
BUSY, RETRY_AFTER_S = 503, 5

log = logging.getLogger(__name__)


class Phase(Enum):
    """Where in its life an engine is."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    RESTING = "resting"

    __hash__ = object.__hash__  # members are singletons; Enum's own hash is a call of Python


TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    # A router that comes late finds engines in whatever phase they are.
    Phase.STOPPED: frozenset({Phase.STARTING, Phase.READY}),
    Phase.STARTING: frozenset({Phase.STARTING, Phase.READY, Phase.RESTING, Phase.STOPPED}),
    Phase.READY: frozenset({Phase.STOPPING, Phase.STOPPED, Phase.STARTING}),
    Phase.STOPPING: frozenset({Phase.STOPPED}),
    Phase.RESTING: frozenset({Phase.STOPPED, Phase.READY, Phase.STARTING}),
}
"""The legal moves; anything else is a defect of kvkeep."""


@dataclass(frozen=True, slots=True)
class StartRefusal:
    """Why a request is not served by an engine on demand."""

    status: int
    message: str
    retry_after_s: int


Decided = Callable[[StartRefusal | None], None]
"""Told once what became of a request that waited; None: an engine is there."""


@dataclass(slots=True, eq=False)
class Waiting:
    """One request that waits."""

    decided: Decided
    deadline_s: float


@dataclass(slots=True, eq=False)
class _Engine:
    member: OnDemandMember
    phase: Phase = Phase.STOPPED
    waiting: list[Waiting] = field(default_factory=list)
    doing: str = ""
    """What it does, or why it failed."""
    num_failures: int = 0
    """Of starts in a row."""
    rest_until_s: float = 0.0
    used_s: float = 0.0
    """When it was last seen with something to do."""
    num_requests: int = 0
    """Of which the endpoint told at the last look."""

    @property
    def name(self) -> str:
        return self.member.title

    def move(self, phase: Phase) -> None:
        assert phase in TRANSITIONS[self.phase], f"{self.phase.name} -> {phase.name}"
        self.phase = phase


class StartDesk:
    """All engines on demand of one router."""

    def __init__(
        self, members: Sequence[OnDemandMember], fleet: Fleet, roster: Roster, starter: Starter
    ) -> None:
        """Have nobody wait, and believe all engines stopped until the starter says otherwise."""
        self._fleet, self._roster, self._starter = fleet, roster, starter
        self._engines = {member.title: _Engine(member) for member in members}
        self._by_model: dict[str, _Engine] = {}
        for engine in self._engines.values():
            for model in engine.member.models:
                self._by_model.setdefault(model, engine)
        self._now_s = 0.0
        self._is_draining = False
        self.num_starts = self.num_failed_starts = self.num_stops = 0

    @property
    def models(self) -> frozenset[str]:
        """Models that are served as soon as somebody asks."""
        return frozenset(self._by_model)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for an engine."""
        return sum(len(engine.waiting) for engine in self._engines.values())

    def status(self) -> list[dict[str, Any]]:
        """Each engine, for ``GET /workers``."""
        return [
            {
                "name": engine.name,
                "models": engine.member.models,
                "state": engine.phase.value,
                "doing": engine.doing,
                "waiting": len(engine.waiting),
            }
            for engine in self._engines.values()
        ]

    # --- Requests ------------------------------------------------------------------------------

    def wait(self, model: str | None, now_s: float, decided: Decided) -> Waiting | None:
        """Have a request wait where its engine is not there.

        Args:
            model: That the request names; without one, the only model there is, if there is one.
            now_s: Monotonic time.
            decided: Told exactly once, perhaps within this call, unless the request leaves before.

        Returns:
            None where there is nothing to wait for: an engine is ready, or no such model starts on
            demand.
        """
        engine = self._find(model)
        if engine is None or self._is_draining or self._is_served(engine, model):
            return None
        waiting = Waiting(decided, now_s + engine.member.start_wait_s)
        if engine.phase is Phase.RESTING and now_s < engine.rest_until_s:
            left_s = ceil(engine.rest_until_s - now_s)
            decided(_refusal(f"could not be started ({engine.doing})", engine, left_s))
        elif len(engine.waiting) >= WAITING_MAX:
            decided(_refusal("starts, and too many requests wait for it", engine))
        else:
            engine.waiting.append(waiting)
            if engine.phase is Phase.RESTING:
                engine.move(Phase.STOPPED)
            if engine.phase is Phase.STOPPED:
                self._start(engine)
        return waiting

    def leave(self, waiting: Waiting) -> None:
        """The client of a request that waits is gone; its engine goes on starting."""
        for engine in self._engines.values():
            if waiting in engine.waiting:
                engine.waiting.remove(waiting)

    def _find(self, model: str | None) -> _Engine | None:
        if model is not None:
            return self._by_model.get(model)
        is_only_one = len(self._engines) == 1 and not any(
            endpoint.name not in self._engines for endpoint in self._fleet
        )
        return next(iter(self._engines.values())) if is_only_one else None

    def _is_served(self, engine: _Engine, model: str | None) -> bool:
        return bool(self._fleet.ready(Role.SERVE, model or engine.member.models[0]))

    def _start(self, engine: _Engine) -> None:
        engine.move(Phase.STARTING)
        engine.doing = ""
        self.num_starts += 1
        log.info("an engine is started on demand. name=%s", engine.name)
        self._starter.start(engine.name)

    # --- What the starter says -----------------------------------------------------------------

    def told(self, news: StartNews, now_s: float) -> None:
        """Something became of an engine; of strangers nothing is heard."""
        self._now_s = now_s
        engine = self._engines.get(news.engine)
        if engine is None:
            return
        if news.state == "starting":
            self._is_starting(engine, news.text)
        elif news.state == "ready":
            self._has_started(engine, now_s)
        elif news.state == "failed":
            self._has_failed(engine, news.text, now_s)
        else:
            self._has_stopped(engine, now_s)

    def _is_starting(self, engine: _Engine, doing: str) -> None:
        if engine.phase is Phase.STOPPING:
            return
        if engine.phase is Phase.READY:
            self._withdraw(engine)
        if engine.phase is not Phase.STARTING:
            engine.move(Phase.STARTING)
        if doing and doing != engine.doing:
            engine.doing = doing
            log.info(
                "an engine starts on demand. name=%s doing=%s waiting=%d",
                engine.name,
                doing,
                len(engine.waiting),
            )

    def _has_started(self, engine: _Engine, now_s: float) -> None:
        if engine.phase is Phase.READY:
            return
        if engine.phase is Phase.STOPPING:
            self._starter.stop(engine.name)  # the order was given while nobody listened
            return
        engine.move(Phase.READY)
        engine.doing, engine.num_failures, engine.used_s = "", 0, now_s
        log.info("an engine is ready. name=%s waiting=%d", engine.name, len(engine.waiting))
        self._declare(engine, now_s)

    def _has_failed(self, engine: _Engine, why: str, now_s: float) -> None:
        if engine.phase is not Phase.STARTING:
            self._has_stopped(engine, now_s)
            return
        engine.doing = why
        engine.num_failures += 1
        self.num_failed_starts += 1
        log.warning("an engine could not be started. name=%s reason=%s", engine.name, why)
        if engine.num_failures < STARTS_MAX and engine.waiting:
            self._start(engine)
            engine.doing = why
            return
        # After its rest it gets one attempt at a time, until one goes well.
        engine.num_failures = STARTS_MAX - 1
        engine.move(Phase.RESTING)
        engine.rest_until_s = now_s + REST_S
        self._refuse(engine, f"could not be started ({why})", ceil(REST_S))

    def _has_stopped(self, engine: _Engine, now_s: float) -> None:
        if engine.phase in (Phase.STOPPED, Phase.RESTING):
            return
        if engine.phase is Phase.READY:
            log.warning("an engine on demand ended by itself. name=%s", engine.name)
            self._withdraw(engine)
        elif engine.phase is Phase.STARTING and engine.waiting:
            # The order was given while nobody listened: who waits bounds how often it is given.
            self._starter.start(engine.name)
            return
        engine.move(Phase.STOPPED)
        if engine.waiting:
            self._start(engine)

    def _declare(self, engine: _Engine, now_s: float) -> None:
        try:
            self._roster.add(engine.member, now_s)
        except KvkeepError as error:
            log.warning("an engine on demand can't join. name=%s reason=%s", engine.name, error)

    def _withdraw(self, engine: _Engine) -> None:
        try:
            self._roster.remove(engine.name, self._now_s)
        except KvkeepError as error:
            log.warning("an engine on demand can't leave. name=%s reason=%s", engine.name, error)

    # --- Time ----------------------------------------------------------------------------------

    def tick(self, now_s: float) -> None:
        """Let go on whose engine is there, refuse who waited too long, stop what is idle."""
        self._now_s = now_s
        for engine in self._engines.values():
            if engine.waiting:
                self._look_at_waiting(engine, now_s)
            if engine.phase is Phase.READY:
                self._look_at_idle(engine, now_s)

    def _look_at_waiting(self, engine: _Engine, now_s: float) -> None:
        if any(self._is_served(engine, model) for model in engine.member.models):
            engine.used_s = now_s
            served, engine.waiting = engine.waiting, []
            for waiting in served:
                waiting.decided(None)
            return
        late = [waiting for waiting in engine.waiting if waiting.deadline_s <= now_s]
        engine.waiting = [waiting for waiting in engine.waiting if waiting not in late]
        for waiting in late:
            waiting.decided(_refusal(f"still starts ({engine.doing or 'no word yet'})", engine))

    def _look_at_idle(self, engine: _Engine, now_s: float) -> None:
        endpoint = self._fleet.find(engine.name)
        if endpoint is None:
            self._declare(engine, now_s)
            return
        traffic = endpoint.traffic
        num_requests = traffic.num_done + traffic.num_failed + traffic.num_left
        if endpoint.num_in_flight or engine.waiting or num_requests != engine.num_requests:
            engine.used_s, engine.num_requests = now_s, num_requests
            return
        limit_s = engine.member.idle_stop_s
        if limit_s and now_s - engine.used_s >= limit_s and not self._is_draining:
            log.info("an idle engine is stopped. name=%s idle_s=%.0f", engine.name, limit_s)
            # From here on nothing is sent there, and nothing is in flight: see above.
            self._withdraw(engine)
            engine.move(Phase.STOPPING)
            self.num_stops += 1
            self._starter.stop(engine.name)

    def drain(self) -> None:
        """The router stops: nobody waits any more, and no engine is started or stopped."""
        self._is_draining = True
        for engine in self._engines.values():
            self._refuse(engine, "was not ready before the router was stopped", 1)

    def _refuse(self, engine: _Engine, why: str, retry_after_s: int) -> None:
        refused, engine.waiting = engine.waiting, []
        for waiting in refused:
            waiting.decided(_refusal(why, engine, retry_after_s))


def _refusal(why: str, engine: _Engine, retry_after_s: int = RETRY_AFTER_S) -> StartRefusal:
    models = ", ".join(engine.member.models)
    return StartRefusal(BUSY, f"the engine for {models} {why}: try again later", retry_after_s)
