"""How busy an endpoint is, and how busy it may become before requests are sent elsewhere."""

import math
from collections.abc import Sequence

from kvkeep.router.snapshot import Endpoint

QUEUED_TOKENS_PER_REQUEST = 1024
"""Queued prompt tokens that weigh as much as one more request in flight."""

FREE_REQUESTS = 4
"""Requests in flight that are never too many: an engine batches so few at hardly any cost, and a
bound relative to a nearly idle fleet would move every second request off its home."""

WEIGHT_MIN = 1e-6
"""Keeps shares finite for an endpoint whose weight was set to nothing."""


def weight_of(endpoint: Endpoint) -> float:
    """What share of the load the endpoint should get, relative to others; above 0."""
    return max(endpoint.weight, WEIGHT_MIN)


def load_of(endpoint: Endpoint) -> float:
    """Requests in flight, and tokens in its queue counted as requests, per weight."""
    queued = endpoint.queued_tokens / QUEUED_TOKENS_PER_REQUEST
    return (endpoint.num_in_flight + queued) / weight_of(endpoint)


class LoadBound:
    """The most requests in flight that each endpoint may have, this request included.

    With ``n`` requests in flight and one to come, an endpoint of share ``w`` of all weights may
    have ``ceil(factor * (n + 1) * w)``, and always ``FREE_REQUESTS``. The bounds add up to more
    than ``n + 1``, so some endpoint is always below its own.

    Source: V. Mirrokni, M. Thorup, M. Zadimoghaddam, Consistent Hashing with Bounded Loads (2016).
    """

    def __init__(self, ready: Sequence[Endpoint], factor: float) -> None:
        num_in_flight = sum(endpoint.num_in_flight for endpoint in ready)
        weights = sum(weight_of(endpoint) for endpoint in ready)
        self._per_weight = factor * (num_in_flight + 1) / weights

    def of(self, endpoint: Endpoint) -> int:
        """Return how many requests the endpoint may have in flight."""
        return max(FREE_REQUESTS, math.ceil(self._per_weight * weight_of(endpoint)))

    def has_room(self, endpoint: Endpoint) -> bool:
        """Return whether one more request keeps the bound."""
        return endpoint.num_in_flight < self.of(endpoint)
