"""Judges one answer against its reference. Pure: no I/O, no clock.

Temperature 0 is not determinism. Cold and reused runs differ by the order of float additions, so
a near-tie between two tokens may fall either way without any byte of KV being wrong. A verdict
therefore weighs the first difference against the gap between the reference's two best tokens and
against the noise that two cold runs of the same stack show (the A/A noise floor).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from kvkeep.validate.answer import Answer, TokenStep

NEAR_TIE_NATS = 0.1
"""Smallest gap that counts as a tie; reduction order alone moves logprobs by up to 0.03 nat."""
CORRUPT_NATS = 3.0
"""Tokens this much less likely than the best one (e**-3: a twentieth) are not rounding."""
TIE_SWING_NATS = 1.0
"""A candidate that prefers the other token by more than this did not toss a coin."""
SECRET_CHARS_MIN = 6
"""Shorter code words could stand in an answer by chance."""


class Verdict(StrEnum):
    """What an answer is, from harmless to fatal."""

    IDENTICAL = "identical"
    NEAR_TIE = "near-tie"
    DRIFT = "drift"
    CORRUPTION = "corruption"
    CONTAMINATION = "contamination"
    NOT_EXERCISED = "not-exercised"
    ERROR = "error"


PASSING = frozenset({Verdict.IDENTICAL, Verdict.NEAR_TIE})
"""Every other verdict fails a run."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict and what it rests on."""

    verdict: Verdict
    reason: str
    """One sentence for a person."""
    position: int | None = None
    """First differing token, 0-based; None if there is none or tokens are unknown."""
    reference_top: tuple[tuple[str, float], ...] = ()
    """The reference's best tokens at that position, at most two."""
    candidate_top: tuple[tuple[str, float], ...] = ()
    """The candidate's best tokens there, at most two."""
    gap_nats: float | None = None
    """Distance between the reference's two best tokens there."""
    logprob_diff_nats: float | None = None
    """Largest difference between the logprobs of tokens that both chose, up to the first fork."""
    noise_nats: float = 0.0
    evidence: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, documented in docs/check.md."""
        return {
            "verdict": self.verdict.value,
            "reason": self.reason,
            "position": self.position,
            "reference_top2": [list(pair) for pair in self.reference_top],
            "candidate_top2": [list(pair) for pair in self.candidate_top],
            "gap_nats": self.gap_nats,
            "logprob_diff_nats": self.logprob_diff_nats,
            "noise_nats": self.noise_nats,
            **self.evidence,
        }


def near_tie_limit_nats(noise_nats: float) -> float:
    """Largest gap between two tokens that noise of this size can turn round."""
    return max(NEAR_TIE_NATS, 2.0 * noise_nats)


def defect_of(answer: Answer) -> str | None:
    """Say why an answer is unusable, or None if it is usable.

    A stream that closes without text and without a finish reason is a failure, not silence.
    """
    if answer.error is not None:
        return answer.error
    if answer.finish_reason is None:
        return "The answer ended without a finish reason."
    if answer.finish_reason in ("error", "abort"):
        return f"The engine gave up: finish reason {answer.finish_reason!r}."
    if not answer.text.strip() and not _only_stopped(answer):
        return "The answer is empty."
    return None


def _only_stopped(answer: Answer) -> bool:
    """True for a blank answer whose tokens are there: the model really said white space."""
    return len(answer.steps) > 1


def foreign_secrets(text: str, own: Iterable[str], known: Iterable[str]) -> list[str]:
    """Find code words in ``text`` that were planted elsewhere.

    Args:
        text: The answer.
        own: Code words of the prompt that was asked.
        known: Code words of all prompts.

    Returns:
        Foreign ones in sorted order. A code word contained in one of the prompt's own is not
        foreign.
    """
    folded, mine = text.casefold(), [secret.casefold() for secret in own]
    return sorted(
        secret
        for secret in set(known)
        if len(secret) >= SECRET_CHARS_MIN
        and secret.casefold() in folded
        and not any(secret.casefold() in secret_of_mine for secret_of_mine in mine)
    )


def judge(
    reference: Answer,
    candidate: Answer,
    *,
    noise_nats: float = 0.0,
    exact: bool = False,
    own_secrets: Sequence[str] = (),
    known_secrets: Sequence[str] = (),
) -> Judgement:
    """Judge one answer.

    Args:
        reference: The answer to the same prompt from a run that is known good.
        candidate: The answer under test.
        noise_nats: A/A noise floor of this stack (`noise_floor`).
        exact: The stack promises equal bits; any difference is corruption.
        own_secrets: Code words of this prompt.
        known_secrets: Code words of all prompts of the run.
    """
    foreign = foreign_secrets(candidate.text, own_secrets, known_secrets)
    if foreign:
        reason = f"The answer holds the code word of another prompt: {', '.join(foreign)}."
        return Judgement(Verdict.CONTAMINATION, reason, noise_nats=noise_nats)
    if (defect := defect_of(candidate)) is not None:
        return Judgement(Verdict.ERROR, defect, noise_nats=noise_nats)
    if (defect := defect_of(reference)) is not None:
        return Judgement(Verdict.ERROR, f"There is no reference: {defect}", noise_nats=noise_nats)
    if exact:
        return _judge_exact(reference, candidate)
    if not reference.steps or not candidate.steps:
        return _judge_text(reference, candidate, noise_nats)
    return _judge_tokens(reference, candidate, noise_nats)


def _judge_text(reference: Answer, candidate: Answer, noise_nats: float) -> Judgement:
    """Without logprobs a difference can't be excused, only reported."""
    same = reference.text == candidate.text
    if same and reference.finish_reason == candidate.finish_reason:
        return Judgement(Verdict.IDENTICAL, "The texts are equal.", noise_nats=noise_nats)
    reason = "The answers differ, and without logprobs no near-tie can be shown."
    return Judgement(Verdict.DRIFT, reason, noise_nats=noise_nats)


def _judge_exact(reference: Answer, candidate: Answer) -> Judgement:
    if not reference.steps or not candidate.steps:
        reason = "The exact mode needs token ids and logprobs, and the server reports none."
        return Judgement(Verdict.ERROR, reason)
    fork = _first_fork(reference.steps, candidate.steps, bitwise=True)
    if fork is None and reference.finish_reason == candidate.finish_reason:
        return Judgement(
            Verdict.IDENTICAL, "Token ids and logprobs are bit-identical.", logprob_diff_nats=0.0
        )
    reason = "The exact mode allows no difference in token ids, logprobs or finish reason."
    return _at_fork(Verdict.CORRUPTION, reason, reference, candidate, fork, 0.0)


def _judge_tokens(reference: Answer, candidate: Answer, noise_nats: float) -> Judgement:
    fork = _first_fork(reference.steps, candidate.steps, bitwise=False)
    limit_nats = near_tie_limit_nats(noise_nats)
    moved_nats = logprob_diff_nats(reference.steps, candidate.steps)
    if fork is None:
        if reference.finish_reason != candidate.finish_reason:
            reason = "Equal tokens, but the answers ended for different reasons."
            return _at_fork(Verdict.DRIFT, reason, reference, candidate, None, noise_nats)
        if moved_nats > limit_nats:
            reason = (
                f"Equal tokens, but a logprob moved by {moved_nats:.3f} nat; "
                f"noise explains {limit_nats:.3f}."
            )
            return _at_fork(Verdict.DRIFT, reason, reference, candidate, None, noise_nats)
        return Judgement(
            Verdict.IDENTICAL,
            "The token ids are equal.",
            logprob_diff_nats=moved_nats,
            noise_nats=noise_nats,
        )
    verdict, reason = _weigh_fork(reference.steps, candidate.steps, fork, limit_nats)
    if verdict is Verdict.NEAR_TIE and moved_nats > limit_nats:
        verdict = Verdict.DRIFT
        reason = (
            f"A logprob before the fork moved by {moved_nats:.3f} nat; "
            f"noise explains {limit_nats:.3f}."
        )
    return _at_fork(verdict, reason, reference, candidate, fork, noise_nats)


def _weigh_fork(
    reference: Sequence[TokenStep],
    candidate: Sequence[TokenStep],
    fork: int,
    limit_nats: float,
) -> tuple[Verdict, str]:
    """Decide what a first difference at ``fork`` means."""
    if fork >= len(reference) or fork >= len(candidate):
        return Verdict.DRIFT, "One answer is the beginning of the other."
    top, other = reference[fork].top, candidate[fork].token
    if len(top) < 2:
        return Verdict.DRIFT, "The tokens differ, and the reference reports no runner-up."
    ranked = dict(top)
    if other not in ranked:
        return Verdict.CORRUPTION, (
            f"The reference did not hold this token among its {len(top)} best at the fork."
        )
    behind_nats = top[0][1] - ranked[other]
    if behind_nats > max(CORRUPT_NATS, limit_nats):
        return Verdict.CORRUPTION, (
            f"The reference held this token for {behind_nats:.2f} nat less likely than its best."
        )
    if other not in (top[0][0], top[1][0]):
        return Verdict.DRIFT, "The other token is not the reference's runner-up."
    gap_nats = top[0][1] - top[1][1]
    if gap_nats > limit_nats:
        return Verdict.DRIFT, (
            f"The two best tokens lie {gap_nats:.3f} nat apart; noise explains {limit_nats:.3f}."
        )
    swing_nats = _gap_nats(candidate[fork].top) or 0.0
    if swing_nats > max(TIE_SWING_NATS, limit_nats):
        return Verdict.DRIFT, (
            f"A tie of {gap_nats:.3f} nat turned into a preference of {swing_nats:.3f} nat."
        )
    return Verdict.NEAR_TIE, (
        f"The other token is the runner-up, {gap_nats:.3f} nat behind (limit {limit_nats:.3f})."
    )


def _gap_nats(top: Sequence[tuple[str, float]]) -> float | None:
    return top[0][1] - top[1][1] if len(top) > 1 else None


def _at_fork(
    verdict: Verdict,
    reason: str,
    reference: Answer,
    candidate: Answer,
    fork: int | None,
    noise_nats: float,
) -> Judgement:
    left, right = _top_at(reference, fork), _top_at(candidate, fork)
    return Judgement(
        verdict,
        reason,
        position=fork,
        reference_top=left,
        candidate_top=right,
        gap_nats=_gap_nats(left),
        logprob_diff_nats=logprob_diff_nats(reference.steps, candidate.steps),
        noise_nats=noise_nats,
    )


def _top_at(answer: Answer, position: int | None) -> tuple[tuple[str, float], ...]:
    if position is None or position >= len(answer.steps):
        return ()
    return answer.steps[position].top[:2]


def _first_fork(
    left: Sequence[TokenStep], right: Sequence[TokenStep], *, bitwise: bool
) -> int | None:
    """Position of the first difference, or None; ``bitwise`` compares logprobs too."""
    for i, (ours, theirs) in enumerate(zip(left, right, strict=False)):
        if ours.token != theirs.token or (bitwise and ours != theirs):
            return i
    return None if len(left) == len(right) else min(len(left), len(right))


def logprob_diff_nats(left: Sequence[TokenStep], right: Sequence[TokenStep]) -> float:
    """Largest difference between chosen tokens' logprobs, up to the first different token."""
    diff_nats = 0.0
    for ours, theirs in zip(left, right, strict=False):
        if ours.token != theirs.token:
            break
        diff_nats = max(diff_nats, abs(ours.logprob - theirs.logprob))
    return diff_nats


def noise_floor(pairs: Iterable[tuple[Answer, Answer]]) -> float:
    """Measure A/A noise: how far logprobs of two cold runs of one prompt lie apart.

    Only positions up to the first different token count: behind it the two runs answer different
    questions. At that fork the tokens both runs ranked are compared, so that a flip is noise of
    the size that made it.

    Returns:
        The largest difference in nats; 0.0 for bit-identical runs.
    """
    noise_nats = 0.0
    for left, right in pairs:
        noise_nats = max(noise_nats, logprob_diff_nats(left.steps, right.steps))
        fork = _first_fork(left.steps, right.steps, bitwise=False)
        if fork is not None and fork < min(len(left.steps), len(right.steps)):
            ours, theirs = dict(left.steps[fork].top), dict(right.steps[fork].top)
            both = ours.keys() & theirs.keys()
            noise_nats = max([noise_nats, *(abs(ours[token] - theirs[token]) for token in both)])
    return noise_nats


def without_exercise(judgement: Judgement, reason: str) -> Judgement:
    """Withdraw a pass that proves nothing, because the path under test did not run.

    A failure stays what it is.
    """
    if judgement.verdict not in PASSING:
        return judgement
    evidence = {**judgement.evidence, "would_be": judgement.verdict.value}
    return Judgement(
        Verdict.NOT_EXERCISED,
        reason,
        position=judgement.position,
        reference_top=judgement.reference_top,
        candidate_top=judgement.candidate_top,
        gap_nats=judgement.gap_nats,
        logprob_diff_nats=judgement.logprob_diff_nats,
        noise_nats=judgement.noise_nats,
        evidence=evidence,
    )
