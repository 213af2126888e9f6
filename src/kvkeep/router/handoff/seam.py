"""What the relay lets others do with one request: send it, read what comes, and send it again."""

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kvkeep.router.health.book import Outcome
from kvkeep.router.router import Router
from kvkeep.router.snapshot import Endpoint

if TYPE_CHECKING:
    from kvkeep.router.relay.relay import Relay


@dataclass(frozen=True, slots=True)
class Unanswered:
    """How an exchange ended of which nobody got anything."""

    status: int
    message: str
    outcome: Outcome | None
    """How it ended at the endpoint; None if there was none to send it to."""
    retry_after_s: int | None = None
    """When to ask again, if whoever is busy says so."""


class Asker(Protocol):
    """Who gets the response: a client's connection, or whoever wants to read it first."""

    relay: "Relay"
    transport: asyncio.Transport
    """Where the response goes."""
    is_stalled: bool

    def pump(self) -> None:
        """Hand on what came of a body that is not whole."""
        ...

    def read_body(self, is_wanted: bool) -> None:
        """Whether the engine takes more of the body."""
        ...

    def exchange_ended(self, keeps: bool, *, is_well: bool = True) -> None:
        """The response is written.

        Args:
            keeps: Whether the connection may serve another request.
            is_well: Whether it is whole and its status below 500.
        """
        ...

    def refuse(
        self, status: int, message: str, *, retry_after_s: int | None = None, fields: bytes = b""
    ) -> None:
        """There is no response but this error."""
        ...

    def reset(self) -> None:
        """What was written can't be ended in order."""
        ...


class Leg(Protocol):
    """Whoever has one request exchanged several times, and decides about repetitions itself."""

    router: Router
    tried: list[Endpoint]
    """Endpoints that are not chosen any more."""
    note: str
    """What else the header X-Kvkeep-Route says."""

    def chosen(self, endpoint: Endpoint) -> None:
        """It goes there."""
        ...

    def began(self) -> None:
        """The engine has the request, or its beginning."""
        ...

    def answered(self) -> None:
        """The asker gets the beginning of a response."""
        ...

    def ended(self, outcome: Outcome) -> None:
        """Nothing is to be had from the endpoint any more."""
        ...

    def failed(self, unanswered: Unanswered) -> None:
        """The asker got nothing, and will from nobody else; said after ``ended``."""
        ...
