"""Which engines have a cartridge in memory, and who of them is asked.

A hint, as what the router believes of prefixes: a wrong one costs a load, never a wrong answer.
"""

from collections.abc import Sequence
from typing import Final

from kvkeep.router.policies.load import LoadBound
from kvkeep.router.snapshot import Endpoint

LOAD_FACTOR: Final = 1.5
"""Of its share of requests; an engine that has more is not asked only for its cartridge. Another
one then loads it, and has it too: what many ask for gets as many holders as it needs."""
CHOICES_MAX: Final = 1024
"""Of remembered groups of engines."""
TOLD: Final = {
    "resident": "requests sent to an engine that has their cartridge in memory",
    "nowhere": "requests whose cartridge no ready engine has in memory, as far as is known",
    "busy": "requests sent elsewhere since all that have their cartridge are too busy",
    "untold": "requests with a cartridge of which no engine says whether it has it",
}
"""How a request's cartridge counted in the choice of its engine, to help text."""


class Holders:
    """What engines, or their hosts, say of their cartridges. The event loop's thread only."""

    def __init__(self) -> None:
        """Know of nobody."""
        self._resident: dict[str, frozenset[str]] = {}
        self._groups: dict[tuple[str, tuple[Endpoint, ...]], tuple[Endpoint, ...]] = {}
        self.counts = dict.fromkeys(TOLD, 0)

    def tell(self, name: str, resident: frozenset[str] | None) -> None:
        """An endpoint has these in memory; None: it does not say."""
        if self._resident.get(name) == resident:
            return
        if resident is None:
            del self._resident[name]
        else:
            self._resident[name] = resident
        self._groups.clear()

    def keep_only(self, names: frozenset[str]) -> None:
        """Forget all other endpoints."""
        for name in self._resident.keys() - names:
            self.tell(name, None)

    def resident_at(self, name: str) -> frozenset[str] | None:
        """What an endpoint has; None if it does not say."""
        return self._resident.get(name)

    def narrow(
        self, cartridge_id: str, ready: Sequence[Endpoint]
    ) -> tuple[Sequence[Endpoint], str]:
        """Those that should be chosen from, never none, and a key of ``TOLD``."""
        if not any(endpoint.name in self._resident for endpoint in ready):
            return ready, "untold"
        group = self._group(cartridge_id, tuple(ready))
        if not group:
            return ready, "nowhere"
        bound = LoadBound(ready, LOAD_FACTOR)
        with_room = tuple(endpoint for endpoint in group if bound.has_room(endpoint))
        if len(with_room) == len(group):
            # The same tuple as the last time: policies keep what they know of it.
            return group, "resident"
        return (with_room, "resident") if with_room else (ready, "busy")

    def _group(self, cartridge_id: str, ready: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
        key = (cartridge_id, ready)
        group = self._groups.get(key)
        if group is None:
            group = tuple(
                endpoint
                for endpoint in ready
                if cartridge_id in self._resident.get(endpoint.name, frozenset())
            )
            if len(self._groups) >= CHOICES_MAX:
                self._groups.clear()
            self._groups[key] = group
        return group
