"""How many prompt tokens a second each endpoint computes, as its first bytes tell."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

RATE_UNKNOWN = 8_000.0
"""Tokens a second of an endpoint before anything was measured in the whole fleet. Only ratios
between endpoints decide, so it matters little."""

TOKENS_MIN = 256
"""A prompt with fewer tokens to compute says more about the network than about the engine."""

FADE_S = 60.0
"""After which a measurement counts for a third: an endpoint that looked slow gets another chance,
for one that is not chosen is not measured either."""

PRIOR_TOKENS = 16_384.0
"""Tokens at the fleet's mean rate that are added to what was measured of an endpoint."""

SLOWER_MAX = 2.0
"""How far from the fleet's mean a rate may be thought to be. A response that is not streamed has
its first byte at its end, so what is measured may be mostly decoding."""


@dataclass(slots=True)
class _Measured:
    num_tokens: float = 0.0
    busy_s: float = 0.0
    last_first_byte_s: float = 0.0

    def fade(self, now_s: float) -> float:
        """Return what is left of the measurements; 1 right after one."""
        return math.exp(min(0.0, self.last_first_byte_s - now_s) / FADE_S)


class PrefillRates:
    """Tokens over busy seconds; busy from when a request was sent, or the one before was done.

    An engine computes prompts one after another, or some of them in one step. Either way the time
    between two first bytes, both requests being there, is what it took to compute the second; so
    waiting in its queue does not look like slowness.
    """

    def __init__(self) -> None:
        self._measured: dict[str, _Measured] = {}

    def of(self, endpoints: Sequence[str], now_s: float) -> list[float]:
        """Return tokens a second of each, near the mean where little was measured lately."""
        tokens = busy_s = 0.0
        for measured in self._measured.values():
            tokens += measured.num_tokens
            busy_s += measured.busy_s
        mean = tokens / max(busy_s, 1e-9) if tokens else RATE_UNKNOWN
        return [self._near(endpoint, mean, now_s) for endpoint in endpoints]

    def _near(self, endpoint: str, mean: float, now_s: float) -> float:
        measured = self._measured.get(endpoint)
        if measured is None:
            return mean
        left = measured.fade(now_s)
        tokens = left * measured.num_tokens + PRIOR_TOKENS
        rate = tokens / (left * measured.busy_s + PRIOR_TOKENS / mean)
        return min(SLOWER_MAX * mean, max(mean / SLOWER_MAX, rate))

    def first_byte(self, endpoint: str, num_tokens: int, now_s: float, wait_s: float) -> None:
        """A response began.

        Args:
            endpoint: Whose.
            num_tokens: Prompt tokens that it is thought to have computed for it.
            now_s: When it began.
            wait_s: Seconds since the request was sent.
        """
        measured = self._measured.setdefault(endpoint, _Measured())
        busy_s = max(0.0, min(wait_s, now_s - measured.last_first_byte_s))
        left = measured.fade(now_s)
        measured.num_tokens *= left
        measured.busy_s *= left
        measured.last_first_byte_s = now_s
        if num_tokens >= TOKENS_MIN:
            measured.num_tokens += num_tokens
            measured.busy_s += busy_s

    def left(self, endpoint: str) -> None:
        """Forget the endpoint."""
        self._measured.pop(endpoint, None)
