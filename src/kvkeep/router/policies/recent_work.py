"""How much each endpoint was given to compute lately: what crowds its cache, if not its queue."""

import math
from collections.abc import Sequence

HORIZON_S = 30.0
"""Work this long ago counts for a third; about as long as a conversation pauses."""


class RecentWork:
    """Tokens given to each endpoint, fading with time.

    Few requests at once leave no queues, and then whoever holds a common beginning would get every
    conversation that begins so: its cache overflows while others stay empty.
    """

    def __init__(self, horizon_s: float = HORIZON_S) -> None:
        self._horizon_s = horizon_s
        self._given: dict[str, tuple[float, float]] = {}

    def give(self, endpoint: str, num_tokens: int, now_s: float) -> None:
        """The endpoint was sent a prompt of which it computes so many tokens."""
        self._given[endpoint] = (self._of(endpoint, now_s) + num_tokens, now_s)

    def excess(self, endpoints: Sequence[str], now_s: float) -> list[float]:
        """Return by how many tokens each is above the mean of them all; 0 if it is not."""
        given = [self._of(endpoint, now_s) for endpoint in endpoints]
        mean = sum(given) / max(1, len(given))
        return [max(0.0, each - mean) for each in given]

    def _of(self, endpoint: str, now_s: float) -> float:
        num_tokens, at_s = self._given.get(endpoint, (0.0, now_s))
        return num_tokens * math.exp((at_s - now_s) / self._horizon_s)

    def left(self, endpoint: str) -> None:
        """Forget the endpoint."""
        self._given.pop(endpoint, None)
