"""How many prompt tokens a second each endpoint computes, as its first bytes tell."""

from dataclasses import dataclass

RATE_UNKNOWN = 8_000.0
"""Tokens a second of an endpoint before anything was measured in the whole fleet. Only ratios
between endpoints decide, so it matters little."""

TOKENS_MIN = 256
"""A prompt with fewer tokens to compute says more about the network than about the engine."""

DECAY = 0.95
"""What a past measurement weighs after each new one: about twenty count."""

RATE_RANGE = (50.0, 1e6)


@dataclass(slots=True)
class _Measured:
    num_tokens: float = 0.0
    busy_s: float = 0.0
    last_first_byte_s: float = 0.0


class PrefillRates:
    """Tokens over busy seconds; busy from when a request was sent, or the one before was done.

    An engine computes prompts one after another, or some of them in one step. Either way the time
    between two first bytes, both requests being there, is what it took to compute the second; so
    waiting in its queue does not look like slowness.
    """

    def __init__(self) -> None:
        self._measured: dict[str, _Measured] = {}

    def of(self, endpoint: str) -> float:
        """Return tokens a second; the mean of the others for an endpoint not measured yet."""
        measured = self._measured.get(endpoint)
        if measured is None or not measured.num_tokens:
            num_tokens = sum(each.num_tokens for each in self._measured.values())
            busy_s = sum(each.busy_s for each in self._measured.values())
        else:
            num_tokens, busy_s = measured.num_tokens, measured.busy_s
        if not num_tokens:
            return RATE_UNKNOWN
        low, high = RATE_RANGE
        return min(high, max(low, num_tokens / max(busy_s, 1e-9)))

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
        measured.last_first_byte_s = now_s
        if num_tokens >= TOKENS_MIN:
            measured.num_tokens = DECAY * measured.num_tokens + num_tokens
            measured.busy_s = DECAY * measured.busy_s + busy_s

    def left(self, endpoint: str) -> None:
        """Forget the endpoint."""
        self._measured.pop(endpoint, None)
