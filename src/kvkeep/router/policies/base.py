"""The seam between the router and the policy that chooses an endpoint."""

from collections.abc import Sequence
from enum import Flag, auto
from typing import Protocol, runtime_checkable

import msgspec

from kvkeep.router.request import RequestView
from kvkeep.router.snapshot import Endpoint


class Needs(Flag):
    """What a policy looks at; the relay works out nothing else, and reads no body for nothing."""

    NOTHING = 0
    KEY = auto()
    """``RequestView.key``."""
    PREFIX = auto()
    """``RequestView.prefix``."""
    TOKENS = auto()
    """``RequestView.num_tokens``."""
    MODEL = auto()
    """``RequestView.model``."""


class Choice(msgspec.Struct, frozen=True):
    """An endpoint, and why."""

    endpoint: Endpoint | None
    """None only if there was none to choose from."""
    reason: str
    """One short ASCII phrase; it goes into the header X-Kvkeep-Route."""
    considered: tuple[tuple[str, float, str], ...] = ()
    """Name, score (lower is better) and why of each endpoint: only if an explanation was asked."""
    num_uncached: int = 0
    """Prompt tokens that the endpoint is expected to compute; 0 from policies that do not know. Its
    ``queued_tokens`` grows by it when the request is sent and shrinks by it at the first byte."""
    num_cached_blocks: int = 0
    """Blocks of the prefix that the endpoint is believed to hold."""


NO_ENDPOINT = Choice(None, "no endpoint is ready")


class Policy(Protocol):
    """Chooses the endpoint of a request.

    What it is: a pure function of its arguments and of its own explicit state: no clock, no I/O,
    no chance but a seeded ``Random`` given at birth.

    Life of one endpoint: ``joined`` once, named in any number of ``ready``, ``left`` once. A name
    that left may join again, and is the same endpoint to whatever is keyed by names.

    The caller guarantees: every endpoint in ``ready`` has joined and not left; names are unique;
    the fields of the request that ``needs`` names are filled wherever the request has them.

    The implementer must: answer an endpoint of ``ready``, or ``NO_ENDPOINT`` if it is empty; raise
    for no request; bound its state; when asked to explain, answer what a plain choice would have
    answered, and change nothing.

    Threading and blocking: the event loop's thread; a choice among 64 endpoints takes microseconds.
    """

    @property
    def name(self) -> str:
        """The word that chooses the policy in settings, and the one in X-Kvkeep-Route."""
        ...

    @property
    def needs(self) -> Needs:
        """What it looks at; the same for its whole life."""
        ...

    def choose(
        self,
        request: RequestView,
        ready: Sequence[Endpoint],
        now_s: float,
        *,
        explain: bool = False,
    ) -> Choice:
        """Choose one of the endpoints that are ready.

        Args:
            request: What is asked.
            ready: Endpoints to choose from; the same tuple as long as nothing changed.
            now_s: Monotonic time.
            explain: Fill ``Choice.considered``.
        """
        ...

    def joined(self, endpoint: Endpoint) -> None:
        """An endpoint may be in ``ready`` from now on."""
        ...

    def left(self, endpoint: Endpoint) -> None:
        """An endpoint is gone; forget what is held for it."""
        ...


@runtime_checkable
class Learns(Protocol):
    """What a policy has besides if it learns from what became of its choices.

    Life of one choice: ``sent`` once, ``first_byte`` at most once, ``ended`` once, in this order. A
    request that is tried again has a choice for each try. Choices without an endpoint are not told.
    """

    def sent(self, request: RequestView, choice: Choice, now_s: float) -> None:
        """The request is on its way to the chosen endpoint."""
        ...

    def first_byte(self, request: RequestView, choice: Choice, now_s: float, wait_s: float) -> None:
        """The response began, ``wait_s`` after the request was sent."""
        ...

    def ended(
        self,
        request: RequestView,
        choice: Choice,
        cached_tokens: int | None,
        num_tokens: int | None,
    ) -> None:
        """The exchange is over.

        Args:
            request: What was asked.
            choice: What was chosen for it.
            cached_tokens: Prompt tokens that the endpoint says it did not compute
                (``usage.prompt_tokens_details.cached_tokens``); None if it did not say.
            num_tokens: Tokens of the prompt as the endpoint counted them; None if it did not say.
        """
        ...
