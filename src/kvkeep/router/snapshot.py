"""What the router knows of each endpoint: one mutable object each, owned by the event loop."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from kvkeep.router.events.settings import EngineEvents


class Role(Enum):
    """Which part of a request an endpoint does."""

    SERVE = "serve"
    PREFILL = "prefill"
    DECODE = "decode"

    __hash__ = object.__hash__  # members are singletons; Enum's own hash is a call of Python


class EndpointState(Enum):
    """Whether an endpoint may be chosen; only READY and SUSPECT ones are."""

    JOINING = "joining"
    READY = "ready"
    SUSPECT = "suspect"
    DOWN = "down"
    DRAINING = "draining"


@dataclass(slots=True)
class Traffic:
    """What went through; only grows."""

    num_done: int = 0
    """Requests that were answered with a status below 500."""
    num_failed: int = 0
    """Requests that were answered with another, or not to the end, or did not get there."""
    num_left: int = 0
    """Requests whose client left before the response was over."""
    num_untold: int = 0
    """Requests that were answered without a word about tokens."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that the engine did not compute."""
    request_bytes: int = 0
    """Of bodies sent to the endpoint."""
    response_bytes: int = 0
    """Of whole responses, heads included."""


@dataclass(slots=True, eq=False)
class Endpoint:
    """One engine's address, its state and its counters."""

    name: str
    host: str
    port: int
    role: Role = Role.SERVE
    models: frozenset[str] = frozenset()
    """Models it serves; empty means any."""
    state: EndpointState = EndpointState.JOINING
    num_in_flight: int = 0
    """Requests relayed to it whose responses have not ended."""
    queued_tokens: int = 0
    """Prompt tokens of those whose first byte has not come yet; 0 where no policy counts tokens."""
    ttft_s: float = 0.0
    """Moving average of the time to the first byte; 0 before the first."""
    weight: float = 1.0
    joined_at_s: float = 0.0
    events: EngineEvents | None = None
    """Where it publishes its block events; None if it does not say."""
    traffic: Traffic = field(default_factory=Traffic)


class Fleet:
    """All endpoints, and the ready ones by role and model."""

    def __init__(self, endpoints: Iterable[Endpoint] = ()) -> None:
        self._endpoints = {endpoint.name: endpoint for endpoint in endpoints}
        self._ready: dict[tuple[Role, str | None], tuple[Endpoint, ...]] = {}
        self.version = 0
        """Grows whenever what ``ready`` says may have changed."""

    def __iter__(self) -> Iterator[Endpoint]:
        return iter(self._endpoints.values())

    def __len__(self) -> int:
        return len(self._endpoints)

    def find(self, name: str) -> Endpoint | None:
        """The endpoint of a name."""
        return self._endpoints.get(name)

    def join(self, endpoint: Endpoint) -> None:
        """Add an endpoint; its name is new."""
        assert endpoint.name not in self._endpoints
        self._endpoints[endpoint.name] = endpoint
        self.changed()

    def leave(self, name: str) -> None:
        """Take an endpoint away; requests that run there keep it until they end."""
        del self._endpoints[name]
        self.changed()

    def changed(self) -> None:
        """An endpoint came, went, or changed its state, role or models."""
        self.version += 1
        self._ready.clear()

    def ready(self, role: Role, model: str | None) -> Sequence[Endpoint]:
        """Endpoints that may be chosen now; the same tuple until something changes."""
        key = (role, model)
        found = self._ready.get(key)
        if found is None:
            found = tuple(
                endpoint
                for endpoint in self._endpoints.values()
                if endpoint.role is role
                and endpoint.state in (EndpointState.READY, EndpointState.SUSPECT)
                and (model is None or not endpoint.models or model in endpoint.models)
            )
            self._ready[key] = found
        return found
