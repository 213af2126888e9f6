"""Whose turn it is: endpoints in the order in which they were last chosen."""

from collections.abc import Iterable

from kvkeep.router.snapshot import Endpoint


class Turns:
    """Remembers when each endpoint was last chosen, in choices and not in seconds.

    Requests of different models or roles take turns over different endpoints; a common counter
    modulo their number would then send all of one kind to one endpoint.
    """

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}
        self._num_turns = 0

    def of(self, endpoint: Endpoint) -> int:
        """Return the turn that the endpoint took last; smaller is longer ago."""
        return self._taken.get(endpoint.name, 0)

    def next_of(self, endpoints: Iterable[Endpoint]) -> Endpoint:
        """Return the one that waited longest, of at least one; changes nothing."""
        return min(endpoints, key=self.of)

    def take(self, endpoint: Endpoint) -> None:
        """The endpoint was chosen."""
        self._num_turns += 1
        self._taken[endpoint.name] = self._num_turns

    def joined(self, endpoint: Endpoint) -> None:
        """A newcomer waits as if it had been chosen just now; it is owed no past turns."""
        self._taken[endpoint.name] = self._num_turns

    def left(self, endpoint: Endpoint) -> None:
        """Forget the endpoint."""
        self._taken.pop(endpoint.name, None)
