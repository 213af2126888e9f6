"""What is known of each endpoint's health, and which probes are due. Pure; told the time.

Requests tell of failures at once, probes tell that an endpoint is back:

    JOINING  -- probe well --> READY
    READY    -- some failures in a row, or nobody listens --> DOWN
    DOWN     -- pause over, probe well --> SUSPECT: it is asked again
    SUSPECT  -- request or probe well --> READY; either failed --> DOWN

DRAINING stands above them: what is found is remembered, and shows when the draining is undone.
"""

import logging
from dataclasses import dataclass
from enum import Enum
from typing import Annotated

import msgspec

from kvkeep.core.breaker import Breaker, BreakerState
from kvkeep.router.snapshot import Endpoint, EndpointState, Fleet

log = logging.getLogger(__name__)


class Outcome(Enum):
    """How a request to an endpoint, or a probe of it, ended."""

    FINISHED = "finished"
    """It answered with a status below 500: a 4xx is the client's business, a 429 says busy."""
    DECLINED = "declined"
    """It said by a 5xx that it does not serve this request, as a busy one does: it is well."""
    CLIENT_LEFT = "client left"
    """Nothing can be said of the endpoint."""
    UNREACHABLE = "unreachable"
    """Nobody listens there: left alone at once. A kept connection that the engine closed meanwhile
    is none: try a new one."""
    ERROR = "error"
    """A 5xx that means a fault."""
    TIMEOUT = "timeout"
    BROKEN = "broken"
    """The response broke in the middle."""

    __hash__ = object.__hash__  # members are singletons; Enum's own hash is a call of Python


FAILURES = frozenset({Outcome.UNREACHABLE, Outcome.ERROR, Outcome.TIMEOUT, Outcome.BROKEN})
FAULTS = frozenset({500, 502, 504})
"""Statuses that say that something is wrong with the engine."""


def outcome_of(status: int) -> Outcome:
    """How a request ended whose response is whole and has this status."""
    if status in FAULTS:
        return Outcome.ERROR
    return Outcome.FINISHED if status < 500 else Outcome.DECLINED


class HealthSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How endpoints are watched."""

    interval_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 2.0
    """Between two probes of an endpoint, in seconds."""
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=600)] = 2.0
    """A probe that takes longer failed."""
    failures_max: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 3
    """Failures in a row, of requests and probes alike, after which an endpoint is left alone."""
    pause_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 2.0
    """Seconds after which an endpoint that was left alone is probed again."""
    path: Annotated[str, msgspec.Meta(pattern=r"^/[!-~]*$")] = "/health"
    """What is asked for; 200 is well."""
    learn_models: bool = True
    """Whether ``/v1/models`` is asked for too, and requests go only where their model is."""


@dataclass(slots=True)
class _Record:
    endpoint: Endpoint
    breaker: Breaker
    next_probe_s: float
    has_answered: bool = False
    """Whether a probe went well since it joined."""
    has_passed: bool = False
    """Whether the breaker's trial, a probe, went well; a second word closes the breaker."""
    is_draining: bool = False
    is_probed: bool = False
    """Whether a probe is on its way."""
    probe_ticket: int = -1
    trial_ticket: int = -1
    """The breaker's while it is half open."""


class HealthBook:
    """The health of a fleet; the one that sets its endpoints' states."""

    def __init__(self, fleet: Fleet, settings: HealthSettings) -> None:
        """Know nobody."""
        self._fleet, self._settings = fleet, settings
        self._records: dict[str, _Record] = {}

    def join(self, endpoint: Endpoint, now_s: float) -> None:
        """An endpoint joined the fleet: it is probed at once, and asked when that went well."""
        breaker = Breaker(self._settings.failures_max, self._settings.pause_s)
        self._records[endpoint.name] = _Record(endpoint, breaker, now_s)
        self._show(self._records[endpoint.name])

    def leave(self, name: str) -> None:
        """An endpoint is gone; what comes of it later is ignored."""
        self._records.pop(name, None)

    def drain(self, name: str, *, is_draining: bool) -> None:
        """Ask an endpoint no more, or again."""
        record = self._records[name]
        record.is_draining = is_draining
        self._show(record, "its draining is over")

    def num_trips(self, name: str) -> int:
        """How often an endpoint was left alone since it joined."""
        record = self._records.get(name)
        return 0 if record is None else record.breaker.num_trips

    # --- Requests ------------------------------------------------------------------------------

    def began(self, endpoint: Endpoint, now_s: float) -> int:
        """A request goes to an endpoint.

        Returns:
            A ticket for ``ended``: what began before an endpoint's state changed says nothing of
            it as it is now.
        """
        record = self._records.get(endpoint.name)
        return -1 if record is None else _ticket(record, now_s)

    def ended(self, endpoint: Endpoint, ticket: int, outcome: Outcome, now_s: float) -> None:
        """That request ended; an endpoint where nobody listens is left alone from this call on."""
        record = self._records.get(endpoint.name)
        if record is None or record.endpoint is not endpoint or outcome is Outcome.CLIENT_LEFT:
            return
        self._report(record, ticket, outcome, now_s, "request")

    # --- Probes --------------------------------------------------------------------------------

    def due(self, now_s: float) -> list[Endpoint]:
        """Endpoints to probe now; each is to be reported with ``probed``, exactly once."""
        found: list[Endpoint] = []
        for record in self._records.values():
            is_open = record.breaker.state is BreakerState.OPEN
            # An endpoint that requests found dead is not left alone for longer than its pause.
            if record.is_probed or (record.next_probe_s > now_s and not is_open):
                continue
            if is_open:
                ticket = record.breaker.begin(now_s)
                if ticket is None:
                    continue
                record.trial_ticket = ticket
            record.probe_ticket, record.is_probed = _ticket(record, now_s), True
            found.append(record.endpoint)
        return found

    def probed(
        self,
        endpoint: Endpoint,
        outcome: Outcome,
        now_s: float,
        models: frozenset[str] | None = None,
    ) -> None:
        """A probe ended; ``models`` are what the endpoint serves, None if it did not say."""
        record = self._records.get(endpoint.name)
        if record is None or record.endpoint is not endpoint:
            return
        record.is_probed = False
        if models is not None and models != endpoint.models:
            endpoint.models = models
            self._fleet.changed()
        is_well = outcome not in FAILURES
        if not record.has_answered:
            # An engine that still loads its model refuses for minutes: nothing is wrong with it.
            record.has_answered = is_well
            self._show(record, "a probe went well")
        elif is_well and _is_on_trial(record) and record.breaker.is_current(record.probe_ticket):
            record.has_passed = True
            self._show(record, "a probe went well")
        else:
            self._report(record, record.probe_ticket, outcome, now_s, "probe")
        settings, is_settled = self._settings, record.endpoint.state is EndpointState.READY
        pause_s = settings.interval_s if is_settled else min(settings.interval_s, settings.pause_s)
        record.next_probe_s = now_s + pause_s

    def _report(
        self, record: _Record, ticket: int, outcome: Outcome, now_s: float, kind: str
    ) -> None:
        breaker = record.breaker
        if outcome not in FAILURES:
            breaker.finish(ticket)
        elif outcome is Outcome.UNREACHABLE:
            breaker.give_up(ticket, now_s)
        else:
            breaker.fail(ticket, now_s)
        # A ticket that is not current any more: it was stale, or this report moved the breaker.
        if not breaker.is_current(ticket):
            self._show(record, f"a {kind} found it: {outcome.value}")

    def _show(self, record: _Record, reason: str = "") -> None:
        if record.breaker.state is not BreakerState.HALF_OPEN:
            record.has_passed = False
        state = _state(record)
        before = record.endpoint.state
        if before is not state:
            record.endpoint.state = state
            self._fleet.changed()
            _tell(record.endpoint, before, reason)


def _tell(endpoint: Endpoint, before: EndpointState, reason: str) -> None:
    """Log that an endpoint is asked no more, or is again; draining is logged by who asks for it."""
    name, state = endpoint.name, endpoint.state
    if state is EndpointState.DOWN:
        log.warning("an endpoint is down. name=%s reason=%s", name, reason)
    elif state is EndpointState.READY and before is EndpointState.JOINING:
        log.info("an endpoint is ready. name=%s reason=%s", name, reason)
    elif state is EndpointState.SUSPECT or before is EndpointState.DOWN:
        log.info("an endpoint is back. name=%s state=%s reason=%s", name, state.value, reason)


def _ticket(record: _Record, now_s: float) -> int:
    """One that is current unless the breaker is open; nobody has a current one then."""
    if record.breaker.state is BreakerState.CLOSED:
        ticket = record.breaker.begin(now_s)
        assert ticket is not None
        return ticket
    return record.trial_ticket


def _is_on_trial(record: _Record) -> bool:
    return record.breaker.state is BreakerState.HALF_OPEN and not record.has_passed


def _state(record: _Record) -> EndpointState:
    if record.is_draining:
        return EndpointState.DRAINING
    if not record.has_answered:
        return EndpointState.JOINING
    if record.breaker.state is BreakerState.CLOSED:
        return EndpointState.READY
    return EndpointState.SUSPECT if record.has_passed else EndpointState.DOWN
