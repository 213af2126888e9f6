"""Who starts engines for a router: what it is told to do, and what it says of them.

`kvkeep up` has one: the supervisor of its stack (`kvkeep.router.on_demand.supervised`). `kvkeep
route` alone has none.
"""

from collections.abc import Callable
from typing import Annotated, Literal, Protocol

import msgspec

from kvkeep.router.membership.member import MEMBERS_MAX, Member

StartState = Literal["starting", "ready", "stopped", "failed"]


class StartNews(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What became of one engine."""

    engine: str
    """Its name."""
    state: StartState
    text: str = ""
    """What it does while it starts, or why it failed."""


class EngineOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is to become of one engine; said again it changes nothing."""

    engine: str
    """Its name."""
    is_wanted: bool


class Starter(Protocol):
    """Starts and stops engines. It never waits: how it goes is told later."""

    def start(self, name: str) -> None:
        """Have an engine started, if it does not run; `StartNews` tells when it answers."""
        ...

    def stop(self, name: str) -> None:
        """Have an engine stopped; nothing is asked of it any more."""
        ...

    async def run(self, told: Callable[[StartNews], None]) -> None:
        """Tell of every engine once, and then of each change, until cancelled."""
        ...


class OnDemandMember(Member, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An engine that is started when it is asked for."""

    models: Annotated[list[str], msgspec.Meta(min_length=1, max_length=64)]
    """Models that it will serve."""
    idle_stop_s: Annotated[float, msgspec.Meta(ge=0)] = 900.0
    """It is stopped after so many seconds without a request; 0: never."""
    start_wait_s: Annotated[float, msgspec.Meta(gt=0)] = 120.0
    """A request waits for it so long at most, in seconds."""


class OnDemandSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Engines that a stack's supervisor starts; `kvkeep up` writes this section."""

    socket: str
    """Unix socket of the supervisor."""
    engines: Annotated[list[OnDemandMember], msgspec.Meta(max_length=MEMBERS_MAX)]
    """All that it starts; of two for one model the first counts."""

    @property
    def models(self) -> frozenset[str]:
        """All models of these engines."""
        return frozenset(model for engine in self.engines for model in engine.models)
