"""What computing and loading cost this engine, from the steps that it made.

Both are straight lines: a part that every step or load costs, and so much for each further token or
block. On a fast engine that first part decides: a step of 128 tokens takes hardly longer than one
of a single token, so a load of 128 tokens saves nothing and has to be paid for.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from kvkeep.core.planner import SURPRISES_MAX, MeasuredRate

STEP_TOKENS_MIN = 128
"""A smaller step is mostly launch, sampling and decode: it says nothing about prefill, unless the
engine makes none that are larger."""
CPU_TOKENS_S = 10_000.0
"""Before anything was measured: faster than a CPU computes models that people serve, so that a
load is not chosen where computing may be faster."""
STEPS_MAX = 64
"""Remembered without a report; more than any engine has in flight."""
HALF_LIFE_STEPS = 4.0
SAMPLES_MIN = 1 + SURPRISES_MAX
"""Of each kind, before a load is turned down: should the first have met a busy machine, the others
have taken its place by then."""
WARM_UP_LOADS = 1
"""Steps with loads that are not measured: in the first, a GPU's engine loads kernels for a prompt
whose end alone is computed, and memory is touched that never was. Once in the life of a process,
and it would have loads turned down that pay."""
LOAD_SHARE_MAX = 0.9
"""A load has to take at most this share of the time that computing the same tokens takes."""
LOAD_MIN_S = 1e-4
"""What a load costs at least; less is an error of measuring."""
STALE_S = 30.0
"""What was turned down for so long is tried again: the machine may be another by now."""


@dataclass(frozen=True, slots=True)
class _Step:
    number: int
    begun_s: float
    num_tokens: int
    loads: Sequence[int]
    """Blocks of each load before its forward pass."""


class StepCosts:
    """Measures steps and decides by them. Used by one thread."""

    def __init__(
        self,
        block_tokens: int,
        *,
        assumed_tokens_s: float = 0.0,
        step_tokens_max: int = STEP_TOKENS_MIN,
        is_pinned: bool = False,
    ) -> None:
        """Know nothing but what is assumed.

        Args:
            block_tokens: Tokens per block.
            assumed_tokens_s: Until a step was measured; 0 for unknown.
            step_tokens_max: Tokens of the engine's largest step.
            is_pinned: Every load is worth it.
        """
        self._block_tokens = block_tokens
        self._is_pinned = is_pinned
        self._assumed_tokens_s = assumed_tokens_s
        self._step_tokens_min = min(STEP_TOKENS_MIN, step_tokens_max)
        self._computing = MeasuredRate(half_life_samples=HALF_LIFE_STEPS)
        """Tokens by seconds."""
        self._loading = MeasuredRate(half_life_samples=HALF_LIFE_STEPS)
        """Blocks of one load by seconds."""
        self._num_warm_ups = 0
        self._begun: deque[_Step] = deque(maxlen=STEPS_MAX)
        self._ended_s = 0.0

    @property
    def tokens_s(self) -> float:
        """Tokens a second that a longer prompt costs; assumed until a large step has ended."""
        speed = self._computing.speed()
        return self._assumed_tokens_s if speed is None else speed.per_s

    def begun(self, step: int, num_tokens: int, loads: Sequence[int], now_s: float) -> None:
        """A step was planned.

        Args:
            step: Its number.
            num_tokens: That it computes.
            loads: Blocks of each load before it.
            now_s: Monotonic.
        """
        if loads or num_tokens >= self._step_tokens_min:
            self._begun.append(_Step(step, now_s, num_tokens, loads))

    def ended(self, step: int, now_s: float) -> None:
        """The report of a step has come; what was planned before it is over as well."""
        while self._begun and self._begun[0].number <= step:
            begun = self._begun.popleft()
            if begun.number == step:
                # A step planned while the one before still ran did not begin at once.
                self._take(begun, now_s - max(begun.begun_s, self._ended_s), now_s)
        self._ended_s = now_s

    def _take(self, step: _Step, seconds: float, now_s: float) -> None:
        if not step.loads:
            self._computing.add(step.num_tokens, seconds, now_s=now_s)
            return
        if self._num_warm_ups < WARM_UP_LOADS:
            self._num_warm_ups += 1
            return
        speed = self._computing.speed()
        if speed is None:
            return
        # All that the loads cost, also where no clock runs: the copies that follow on a GPU, the
        # forward pass that was launched later.
        num_loads = len(step.loads)
        cost_s = max(LOAD_MIN_S, (seconds - speed.seconds(step.num_tokens)) / num_loads)
        self._loading.add(sum(step.loads) / num_loads, cost_s, now_s=now_s)

    def is_load_worth(self, num_tokens: int, now_s: float) -> bool:
        """Whether to load the blocks of these tokens rather than compute; so until it is known."""
        computing, loading = self._computing.speed(), self._loading.speed()
        num_samples = min(self._computing.num_samples, self._loading.num_samples)
        if self._is_pinned or computing is None or loading is None or num_samples < SAMPLES_MIN:
            return True
        load_s = loading.seconds(-(-num_tokens // self._block_tokens))
        is_faster = load_s <= LOAD_SHARE_MAX * num_tokens / computing.per_s
        return is_faster or now_s - self._loading.measured_at_s > STALE_S
