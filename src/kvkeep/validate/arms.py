"""Asks the same prompts in several arms and compares every answer with the first arm's.

An arm is one way to come by the KV of a prompt: computed cold, still on the engine, loaded after a
reset, loaded by another engine, loaded after a restart. The first arm is the reference.

    reports = await compare_arms(standard_arms(names, engine, run_id=..., other=...), prompts, ...)
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from kvkeep.model.errors import InputError, UnavailableError
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
ARM_NAMES = ("cold", "cached", "reset", "other-engine", "restart")

Before = Callable[[], Awaitable[None]]


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


def standard_arms(
    names: Sequence[str],
    engine: Endpoint,
    *,
    run_id: str,
    daemon: Endpoint | None = None,
    other: Endpoint | None = None,
    restart: Before | None = None,
) -> list[Arm]:
    """Build the arms called ``names``, in that order.

    Where anything is to be reused, an arm ``fill`` that computes and stores everything is put
    behind ``cold``; its answers are judged like the others.

    Args:
        names: Of `ARM_NAMES`; the first one is the reference.
        engine: The engine that computes first.
        run_id: Unique per run, so that no earlier run's KV is found.
        daemon: Where kvkeep's counters are read; optional.
        other: An engine that never saw the prompts, for ``other-engine``.
        restart: Restarts ``engine`` and returns when it is ready, for ``restart``.

    Raises:
        InputError: A name is unknown, or what its arm needs is missing.
    """
    unknown = [name for name in names if name not in ARM_NAMES]
    if unknown or not names:
        raise InputError(f"Unknown arms {unknown}: take some of {', '.join(ARM_NAMES)}.")
    if "other-engine" in names and other is None:
        raise InputError("The arm other-engine needs a second engine in the stack file.")
    if "restart" in names and restart is None:
        raise InputError("The arm restart needs a stack that this check started (--stack).")

    async def reset() -> None:
        report = await engine.reset_prefix_cache()
        if not report.ok:
            raise UnavailableError(f"The engine's cache could not be reset: {report.detail}")

    fill = Arm("fill", engine, Source.NOWHERE, run_id, daemon=daemon)
    build = {
        "cold": Arm("cold", engine, Source.NOWHERE, run_id + "-cold", True, daemon=daemon),
        "cached": Arm("cached", engine, Source.ENGINE, run_id, daemon=daemon),
        "reset": Arm("reset", engine, Source.OUTSIDE, run_id, before=reset, daemon=daemon),
        "other-engine": Arm("other-engine", other or engine, Source.OUTSIDE, run_id, daemon=daemon),
        "restart": Arm("restart", engine, Source.OUTSIDE, run_id, before=restart, daemon=daemon),
    }
    arms = [build[name] for name in names]
    reused = [i for i, arm in enumerate(arms) if arm.source is not Source.NOWHERE]
    if reused:
        arms.insert(reused[0], fill)
    return arms


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
    results: list[ArmResult] = []
    reference: tuple[Answer, ...] = ()
    secrets = [secret for prompt in prompts for secret in prompt.secrets]
    for arm in arms:
        phase = await _run_arm(arm, prompts, sampling, progress)
        served = served_in(phase, block_tokens)
        check = _check_source(arm, served)
        reference = reference or phase.answers
        judged = []
        for i, prompt in enumerate(prompts):
            verdict = judge(
                reference[i],
                phase.answers[i],
                noise_nats=noise_nats,
                exact=exact,
                own_secrets=prompt.secrets,
                known_secrets=secrets,
            )
            if check.ok is not True:
                verdict = without_exercise(verdict, check.detail)
            item = Judged(arm.name, prompt, i, verdict, reference[i], phase.answers[i])
            judged.append(item)
        # The reference agrees with itself; only what fails by itself is news.
        kept = [item for item in judged if results or item.judgement.verdict not in PASSING]
        results.append(ArmResult(arm.name, arm.source, phase, served, tuple(kept), check))
    return ArmsReport(exact, tuple(results))


async def _run_arm(
    arm: Arm, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress
) -> Phase:
    watch = Watch(arm.endpoint, arm.daemon)
    # Stores of the arm before run behind its answers; a reset or restart must not overtake them.
    await watch.read_settled()
    if arm.before is not None:
        await arm.before()

    def salt_of(i: int, prompt: Prompt) -> str:
        return f"{arm.salt}-{i}" if arm.salt_per_request else arm.salt

    return await run_phase(arm.name, watch, prompts, sampling, salt_of=salt_of, progress=progress)


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
