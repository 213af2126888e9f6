"""The demo: the same questions over long documents, answered in every way a cache has to get right.

Each phase asks the same questions. The first computes them, the second repeats them and is the
yardstick: what a load brings back are the very bytes that the engine still has then, so answers
must be equal to the bit. Nothing here is asserted about absolute times.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import median

from kvkeep.validate.answer import Answer, Prompt
from kvkeep.validate.counters import servable_of_one
from kvkeep.validate.load import Endpoint, Sampling
from kvkeep.validate.runner import Phase, Progress, Watch, no_progress, run_phase
from kvkeep.validate.verdict import PASSING, Verdict, judge

SERVED_SHARE_MIN = 0.98
"""Of the whole blocks before the last token, at least this share must come from where it should."""
MAX_TOKENS = 24
SALT = "demo"


@dataclass(frozen=True, slots=True)
class Act:
    """One phase of the demo."""

    name: str
    engine: Endpoint
    source: str
    """``computed``, ``engine`` or ``kvkeep``: where the prompts' KV must come from."""
    num_questions: int
    before: Callable[[], Awaitable[None]] | None = None
    """What is done to the stack before the questions are asked."""
    is_yardstick: bool = False
    """Its answers are what later ones must be equal to."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the demo's table."""

    name: str
    ttft_s: float
    """Median time to the first token."""
    share: float
    """Of the servable prompt tokens, those that came from where they should; 1.0 if computed."""
    verdicts: dict[str, int]
    promises_broken: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """JSON form."""
        return {
            "phase": self.name,
            "ttft_s_median": self.ttft_s,
            "served_share": self.share,
            "verdicts": self.verdicts,
            "promises_broken": list(self.promises_broken),
        }


async def play(
    acts: Sequence[Act],
    daemon: Endpoint | None,
    prompts: Sequence[Prompt],
    block_tokens: int,
    progress: Progress = no_progress,
) -> list[Row]:
    """Run the acts in order.

    Returns:
        One row per act; an act that broke a promise says so in its row.

    Raises:
        UnavailableError: An engine's counters can't be read.
    """
    rows: list[Row] = []
    cold: tuple[Answer, ...] = ()
    yardstick: tuple[Answer, ...] = ()
    sampling = Sampling(max_tokens=MAX_TOKENS)
    for act in acts:
        if act.before is not None:
            await act.before()
        asked = prompts[: act.num_questions]
        phase = await run_phase(
            act.name, Watch(act.engine), asked, sampling, salt_of=lambda *_: SALT,
            progress=progress,
        )  # fmt: skip
        cold = cold or phase.answers
        rows.append(_judge(act, phase, yardstick or cold, block_tokens, exact=bool(yardstick)))
        if act.is_yardstick:
            yardstick = phase.answers
    return rows


def _judge(
    act: Act, phase: Phase, reference: Sequence[Answer], block_tokens: int, *, exact: bool
) -> Row:
    secrets = [secret for prompt in phase.prompts for secret in prompt.secrets]
    # What is computed may differ from a hit by the order of additions; what is loaded may not.
    exact = exact and act.source != "computed"
    judged = [
        judge(wanted, got, exact=exact, own_secrets=prompt.secrets, known_secrets=secrets)
        for prompt, wanted, got in zip(phase.prompts, reference, phase.answers, strict=False)
    ]
    verdicts: dict[str, int] = {}
    for judgement in judged:
        verdicts[judgement.verdict.value] = verdicts.get(judgement.verdict.value, 0) + 1
    share = _share(act, phase, block_tokens)
    broken = [f"{j.verdict.value}: {j.reason}" for j in judged if not _is_right(j.verdict, act)]
    if share < SERVED_SHARE_MIN:
        broken.append(f"only {share:.0%} of the prompt tokens came from the {act.source}")
    times = [answer.ttft_s for answer in phase.answers if answer.ttft_s is not None]
    return Row(act.name, median(times) if times else 0.0, share, verdicts, tuple(broken))


def _is_right(verdict: Verdict, act: Act) -> bool:
    # Between a computed answer and vLLM's own hit lies its rounding: in bfloat16 up to 0.25 nat,
    # and without kvkeep too. What kvkeep loads is held to the bit.
    return verdict in PASSING or (act.source != "kvkeep" and verdict is Verdict.DRIFT)


def _share(act: Act, phase: Phase, block_tokens: int) -> float:
    if act.source == "computed":
        return 1.0
    servable = sum(
        servable_of_one(answer.prompt_tokens or 0, block_tokens) for answer in phase.answers
    )
    delta = phase.delta
    served = delta.local_hit_tokens if act.source == "engine" else delta.external_hit_tokens
    return served / servable if servable else 0.0
