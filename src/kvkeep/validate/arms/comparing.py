"""Asks the same prompts in several arms and compares every answer with the first arm's.

An arm is one way to come by the KV of a prompt: computed cold, still on the engine, loaded after a
reset, from a disk, by another engine, after a restart. The first arm is the reference.

    report = await compare_arms(standard_arms(names, means, run_id=...), prompts, ...)
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from kvkeep.validate.answer import Answer, Prompt
from kvkeep.validate.load import Endpoint, Sampling
from kvkeep.validate.runner import (
    SERVED_SHARE_MIN,
    Check,
    Judged,
    Phase,
    Progress,
    Served,
    Watch,
    count_verdicts,
    no_progress,
    run_phase,
    served_in,
)
from kvkeep.validate.verdict import PASSING, Verdict, judge, without_exercise

SCHEMA = "kvkeep.check.arms/1"

Before = Callable[[], Awaitable[None]]
NumRead = Callable[[], Awaitable[int]]


class Source(StrEnum):
    """Where an arm's KV must come from for the arm to mean anything."""

    NOWHERE = "nowhere"
    """Computed."""
    ENGINE = "engine"
    """The engine's own prefix cache."""
    OUTSIDE = "outside"
    """The cache under test."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to come by the KV."""

    name: str
    endpoint: Endpoint
    source: Source
    salt: str
    """Prefix of the requests' cache salts; arms with equal salts share KV."""
    salt_per_request: bool = False
    """A salt of its own for each request, so that nothing can be reused: a cold oracle."""
    before: Before | None = None
    """Done before the first request: reset, restart."""
    daemon: Endpoint | None = None
    front: Endpoint | None = None
    """Who is asked instead of the engine itself, whose counters count all the same."""
    num_read: NumRead | None = None
    """Blocks read so far from the tiers that its KV has to come from; None: wherever it lies."""


@dataclass(frozen=True, slots=True)
class Asking:
    """How arms are asked and judged; the same for all of them."""

    sampling: Sampling
    block_tokens: int | None
    """Tokens per block, for the shares served."""
    exact: bool
    """Any difference is corruption."""
    noise_nats: float = 0.0
    """A/A noise floor; without meaning in the exact mode."""
    progress: Progress = no_progress
    """Told about every answer."""


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm's answers, verdicts and proof."""

    name: str
    source: Source
    phase: Phase
    served: Served
    judged: tuple[Judged, ...]
    """One per prompt; empty for the first arm, which is the reference."""
    check: Check
    """Whether the KV came from where it should."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "name": self.name,
            "source": self.source.value,
            "phase": self.phase.to_dict(),
            "served": self.served.to_dict(),
            "check": self.check.to_dict(),
            "counts": count_verdicts(self.judged),
            "requests": [item.to_dict() for item in self.judged],
        }


@dataclass(frozen=True, slots=True)
class ArmsReport:
    """All arms of one comparison."""

    exact: bool
    arms: tuple[ArmResult, ...]

    @property
    def judged(self) -> tuple[Judged, ...]:
        """Every judged request."""
        return tuple(item for arm in self.arms for item in arm.judged)

    @property
    def passed(self) -> bool:
        """Every answer passes and every arm's KV came from where it should."""
        return (
            all(item.judgement.verdict in PASSING for item in self.judged)
            and all(arm.check.ok is True for arm in self.arms)
            and len(self.arms) > 1
        )

    @property
    def outcome(self) -> str:
        """``passed``, ``failed`` or ``not-exercised``; a failure outweighs the rest."""
        if self.passed:
            return "passed"
        verdicts = {item.judgement.verdict for item in self.judged}
        return "failed" if verdicts - PASSING - {Verdict.NOT_EXERCISED} else "not-exercised"

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "schema": SCHEMA,
            "suite": "arms",
            "exact": self.exact,
            "outcome": self.outcome,
            "passed": self.passed,
            "arms": [arm.to_dict() for arm in self.arms],
        }


async def compare_arms(
    arms: Sequence[Arm],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    block_tokens: int | None,
    exact: bool,
    noise_nats: float = 0.0,
    progress: Progress = no_progress,
) -> ArmsReport:
    """Run arms one after the other and judge each against the first.

    The endpoints must have been probed (`kvkeep.validate.capability.probe`).

    Args:
        arms: At least two for a result that can pass.
        prompts: Asked in order in every arm.
        sampling: The same in every arm.
        block_tokens: Tokens per block, for the shares served.
        exact: Any difference is corruption.
        noise_nats: A/A noise floor; without meaning in the exact mode.
        progress: Told about every answer.

    Raises:
        UnavailableError: An engine could not be reset or restarted, or a daemon not be read.
    """
    asking = Asking(sampling, block_tokens, exact, noise_nats, progress)
    results: list[ArmResult] = []
    for arm in arms:
        reference = results[0].phase.answers if results else None
        results.append(await run_arm(arm, prompts, asking, reference))
    return ArmsReport(exact, tuple(results))


async def run_arm(
    arm: Arm, prompts: Sequence[Prompt], asking: Asking, reference: Sequence[Answer] | None = None
) -> ArmResult:
    """Ask every prompt once in one arm, and judge.

    Args:
        arm: The way.
        prompts: Asked in order.
        asking: How.
        reference: Right answers to these prompts; None: this arm gives them, and only what fails
            by itself is judged.

    Raises:
        UnavailableError: What comes before the arm did not work, or a daemon can't be read.
    """
    watch = Watch(arm.endpoint, arm.daemon, front=arm.front)
    # Stores of the arm before run behind its answers; a reset or restart must not overtake them.
    await watch.read_settled()
    if arm.before is not None:
        await arm.before()
    read_before = 0 if arm.num_read is None else await arm.num_read()

    def salt_of(i: int, prompt: Prompt) -> str:
        return f"{arm.salt}-{i}" if arm.salt_per_request else arm.salt

    phase = await run_phase(
        arm.name, watch, prompts, asking.sampling, salt_of=salt_of, progress=asking.progress
    )
    served = served_in(phase, asking.block_tokens)
    check = _check_source(arm, served)
    if arm.num_read is not None and check.ok:
        check = _check_tier(arm, served, await arm.num_read() - read_before, asking.block_tokens)
    secrets = [secret for prompt in prompts for secret in prompt.secrets]
    judged = []
    for i, prompt in enumerate(prompts):
        right = phase.answers[i] if reference is None else reference[i]
        verdict = judge(
            right,
            phase.answers[i],
            noise_nats=asking.noise_nats,
            exact=asking.exact,
            own_secrets=prompt.secrets,
            known_secrets=secrets,
        )
        if check.ok is not True:
            verdict = without_exercise(verdict, check.detail)
        # The reference agrees with itself; only what fails by itself is news.
        if reference is not None or verdict.verdict not in PASSING:
            judged.append(Judged(arm.name, prompt, i, verdict, right, phase.answers[i]))
    return ArmResult(arm.name, arm.source, phase, served, tuple(judged), check)


def _check_source(arm: Arm, served: Served) -> Check:
    """Whether an arm's KV came from where it should."""
    name, external, local = f"arm {arm.name}", served.external_tokens, served.local_tokens
    could, could_local = served.servable_external_tokens, served.servable_local_tokens
    if could is None or could_local is None:
        return Check(name, None, served.why_not_exercised() or "", gate=True)
    if arm.source is Source.OUTSIDE:
        reason = served.why_not_exercised()
        if reason is None and local > could_local:
            reason = f"{local} tokens came from the engine itself, which should have been empty."
        detail = f"{external} of {could} servable tokens from outside, {local} from the engine."
        return Check(name, reason is None, reason or detail, gate=True)
    if arm.source is Source.ENGINE:
        detail = f"{local} of {could + could_local} servable tokens from the engine itself."
        return Check(name, local >= SERVED_SHARE_MIN * (could + could_local), detail, gate=True)
    # Shared first blocks, such as a system prompt's, may repeat within an arm without salts.
    allowed = 0 if arm.salt_per_request else could_local
    detail = f"{external} tokens from outside and {local} from the engine; {allowed} may repeat."
    return Check(name, external == 0 and local <= allowed, detail, gate=True)


def _check_tier(arm: Arm, served: Served, num_read: int, block_tokens: int | None) -> Check:
    """Whether what came from outside was read from the tier that the arm is about."""
    could = (served.servable_external_tokens or 0) // (block_tokens or 1)
    detail = f"{num_read} blocks were read from the tier; {could} could have been."
    return Check(f"arm {arm.name}", num_read >= SERVED_SHARE_MIN * could, detail, gate=True)
