"""A kind of subject: what tells it, and what a check has to know of it.

What it is
    One module of this package for each kind, whose ``KIND`` declares it; `registry` has the list.

The implementer must
    Tell its own kind from `Signs` alone. Change how a suite asks or counts by ``hooks`` only: the
    suites know no kinds, so that all of them are judged alike.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from kvkeep.validate.subjects.hooks import Hooks


@dataclass(frozen=True, slots=True)
class Signs:
    """What can be seen of a subject: in its stack file, or at its address."""

    program: str = ""
    """``vllm`` or ``trtllm``; empty: unknown."""
    connectors: tuple[str, ...] | None = None
    """vLLM's names of its connectors, those inside a MultiConnector too; None: unknown."""
    version: str = ""
    """What it says of its own version."""

    def has(self, *names: str) -> bool:
        """Whether one of these connectors is there."""
        return not set(names).isdisjoint(self.connectors or ())


UNKNOWN = Signs()
"""Nothing could be seen."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of subject."""

    name: str
    """As ``--subject`` takes it."""
    title: str
    """What is judged, in a few words."""
    is_it: Callable[[Signs], bool]
    beside: str
    """What runs beside the engine, and who starts it."""
    counted: str
    """What proves that KV came from outside the engine."""
    trial: str
    """Where it was judged, or why it was not."""
    when_idle: str
    """What to look at where nothing came from outside; one sentence."""
    hooks: Hooks = field(default_factory=Hooks)
    examples: tuple[str, ...] = ()
    """Stack files in ``examples/`` that begin one."""
