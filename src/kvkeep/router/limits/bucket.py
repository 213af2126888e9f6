"""Rates: so much in the long run, so much at once. Pure; told the time."""

_SLACK = 1e-6
"""Of one unit: whoever waited as long as told must not be refused for a rounding error."""
_SLACK_S = 1e-6
"""The same of time, where a unit takes less than a second."""


class TokenBucket:
    """Fills at a rate up to a limit; what is taken has to be there.

    Of what is more than the limit only the limit has to be there: the rest is owed, and has to come
    back before anything is taken again. So whatever is asked for can be had, and the rate holds.
    """

    __slots__ = ("_at_s", "_burst", "_level", "_rate_per_s", "_slack")

    def __init__(self, rate_per_s: float, burst: float) -> None:
        """Be full.

        Args:
            rate_per_s: Units that come back each second; above 0.
            burst: Units at once; at least 1.
        """
        assert rate_per_s > 0
        assert burst >= 1
        self._rate_per_s, self._burst = rate_per_s, burst
        self._slack = max(_SLACK, _SLACK_S * rate_per_s)
        self._level = burst
        self._at_s: float | None = None

    def wait_s(self, now_s: float, amount: float = 1.0) -> float:
        """Seconds until so many units can be taken; 0 if they can be now."""
        missing = min(amount, self._burst) - self._level_at(now_s)
        return 0.0 if missing <= self._slack else missing / self._rate_per_s

    def take(self, now_s: float, amount: float = 1.0) -> bool:
        """Take so many units, if they are there."""
        is_there = self.wait_s(now_s, amount) == 0
        level = self._level_at(now_s)
        left = level - amount if is_there else level
        self._level, self._at_s = 0.0 if -self._slack <= left < 0 else left, now_s
        return is_there

    def put_back(self, amount: float, now_s: float) -> None:
        """Give back units that were not used; of those used beyond what was taken less than 0."""
        self._level, self._at_s = min(self._burst, self._level_at(now_s) + amount), now_s

    def _level_at(self, now_s: float) -> float:
        if self._at_s is None:
            return self._level
        passed_s = max(0.0, now_s - self._at_s)
        return min(self._burst, self._level + passed_s * self._rate_per_s)


class RetryBudget:
    """How many requests may be sent a second time: a share of all, and a few each second.

    Retries multiply load just when there is too little of everything, so they are limited by what
    was asked for: in any time, at most ``burst + share x requests + min_per_s x seconds``.
    """

    __slots__ = ("_at_s", "_burst", "_level", "_min_per_s", "_share")

    def __init__(self, share: float, min_per_s: float, burst: float) -> None:
        """Be full: the first requests after a start may be retried too."""
        assert share >= 0
        assert min_per_s >= 0
        self._share, self._min_per_s, self._burst = share, min_per_s, burst
        self._level = burst
        self._at_s: float | None = None

    def requested(self) -> None:
        """A request came; not called for a retry."""
        self._level = min(self._burst, self._level + self._share)

    def take(self, now_s: float) -> bool:
        """Take one retry, if the budget has it."""
        if self._at_s is not None:
            passed_s = max(0.0, now_s - self._at_s)
            self._level = min(self._burst, self._level + passed_s * self._min_per_s)
        self._at_s = now_s
        if self._level < 1.0 - _SLACK:
            return False
        self._level = max(0.0, self._level - 1.0)
        return True
