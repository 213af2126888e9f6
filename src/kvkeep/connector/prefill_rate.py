"""How many tokens a second this engine computes, from the steps that it made.

Known to the planner, which compares it with what a load from a lower tier would take.
"""

from collections import deque

STEP_TOKENS_MIN = 128
"""A smaller step is mostly launch, sampling and decode: it says nothing about prefill, unless the
engine makes none that are larger."""
WEIGHT = 0.3
"""Of the newest step in the mean."""
CPU_TOKENS_S = 10_000.0
"""Before anything was measured: faster than a CPU computes models that people serve, so that a
load is not chosen where computing may be faster."""
STEPS_MAX = 64
"""Remembered without a report; more than any engine has in flight."""


class PrefillRate:
    """A mean over the last few large steps. Used by one thread."""

    def __init__(
        self, assumed_tokens_s: float = 0.0, step_tokens_max: int = STEP_TOKENS_MIN
    ) -> None:
        """Know nothing but what is assumed.

        Args:
            assumed_tokens_s: Until a step was measured; 0 for unknown.
            step_tokens_max: Tokens of the engine's largest step.
        """
        self._assumed_tokens_s = assumed_tokens_s
        self._step_tokens_min = min(STEP_TOKENS_MIN, step_tokens_max)
        self._measured_tokens_s = 0.0
        self._begun: deque[tuple[int, float, int]] = deque(maxlen=STEPS_MAX)
        """Step, when it was planned, tokens."""
        self._ended_s = 0.0

    @property
    def tokens_s(self) -> float:
        """What is known, or assumed until a large step has ended."""
        return self._measured_tokens_s or self._assumed_tokens_s

    def begun(self, step: int, num_tokens: int, now_s: float) -> None:
        """A step was planned that computes this many tokens and loads nothing."""
        if num_tokens >= self._step_tokens_min:
            self._begun.append((step, now_s, num_tokens))

    def ended(self, step: int, now_s: float) -> None:
        """The report of a step has come; what was planned before it is over as well."""
        while self._begun and self._begun[0][0] <= step:
            begun_step, begun_s, num_tokens = self._begun.popleft()
            if begun_step == step:
                # A step planned while the one before still ran did not begin at once.
                self._take(num_tokens / max(now_s - max(begun_s, self._ended_s), 1e-6))
        self._ended_s = now_s

    def _take(self, tokens_s: float) -> None:
        before = self._measured_tokens_s
        self._measured_tokens_s = before + WEIGHT * (tokens_s - before) if before else tokens_s
