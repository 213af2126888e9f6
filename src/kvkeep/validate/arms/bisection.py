"""Asks again what came out wrong: how often it does, and which way to its KV is wrong first.

    computed -> kept by the engine
             -> blocks of the run: pool, disk, remote, other engine
             -> stored anew: pool, disk, remote, other engine, hand-off, restart

Each suspicious prompt is asked several times in each arm, one request at a time. A fault in stored
bytes shows in the blocks that the run stored, under its own salt; a fault of a path shows in blocks
stored anew as well, and the nearest place where it does is where the path first goes wrong.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import Any

from kvkeep.model.errors import KvkeepError
from kvkeep.validate.answer import Answer
from kvkeep.validate.arms.comparing import Arm, ArmResult, Asking, Source, run_arm
from kvkeep.validate.arms.standard import Means, reset_of, standard_arms
from kvkeep.validate.runner import Judged
from kvkeep.validate.verdict import Verdict

REPEATS = 3
"""Times that each arm is asked for each prompt."""
SUSPECTS_MAX = 3
"""Prompts that are looked into: one shows where a path is wrong, three that it is always there."""
SUSPICIOUS = frozenset({Verdict.DRIFT, Verdict.CORRUPTION, Verdict.CONTAMINATION})
"""Verdicts on an answer that is there and should be another."""
_WRONG_BESIDE_ROUNDING = SUSPICIOUS - {Verdict.DRIFT}
UNPROVEN = frozenset({Verdict.NOT_EXERCISED, Verdict.ERROR})
"""Verdicts that say nothing about the arm's KV."""
STORED = ("reset", "disk", "remote", "other-engine")
"""Arms that can be asked about blocks which lie there already."""
ONCE = ("fill", "restart")
"""Arms that are asked once: the first only fills, the last takes a minute."""
WHERE = {
    "cold": "where it is computed",
    "fill": "where it is computed and stored",
    "cached": "from the engine's own cache",
    "reset": "from outside, after a reset of the engine",
    "disk": "from a disk",
    "remote": "from behind a network",
    "other-engine": "on another engine",
    "hand-off": "handed over by a prefill engine",
    "restart": "from outside, after a restart of the engine",
}


class Blocks(StrEnum):
    """Which blocks an arm was asked about."""

    NONE = "none"
    """Computed, or computed and stored."""
    OF_THE_RUN = "of the run"
    """Those that the run stored, under its own salt."""
    ANEW = "stored anew"
    """Stored for this, under another salt."""


@dataclass(slots=True)
class Tally:
    """How one prompt fared in one arm."""

    arm: str
    blocks: Blocks
    asked: int = 0
    differed: int = 0
    """Answers that were wrong."""
    unproven: int = 0
    """Answers that failed, or whose KV did not come from where the arm says."""


@dataclass(slots=True)
class Suspect:
    """One suspicious prompt, looked into."""

    prompt_id: str
    phase: str
    """Where the run found it."""
    verdict: Verdict
    """That the run gave."""
    tallies: list[Tally] = field(default_factory=list)
    """In the order of asking."""
    broken_off: str | None = None
    """Why arms are missing."""

    @property
    def first(self) -> Tally | None:
        """The nearest arm that is wrong: among blocks stored anew, else among those of the run."""
        wrong = [tally for tally in self.tallies if tally.differed]
        anew = (tally for tally in wrong if tally.blocks is not Blocks.OF_THE_RUN)
        return next(anew, wrong[0] if wrong else None)

    @property
    def sentence(self) -> str:
        """What was found, for a person."""
        found = self.first
        if found is None:
            asked = sum(tally.asked - tally.unproven for tally in self.tallies)
            text = (
                f"Asked alone, {asked} times in all, it is right: the fault takes what went on "
                "beside it, or comes seldom."
            )
        else:
            where, times = WHERE[found.arm], f"{found.differed} of {found.asked} times"
            if found.blocks is Blocks.NONE:
                text = f"It differs {times} {where}: that is the engine, before any cache."
            elif found.blocks is Blocks.ANEW:
                text = f"It is first wrong {where}, {times}, also with blocks stored anew."
            else:
                text = f"Blocks that the run stored are wrong {where}, {times}; new ones are right."
        return text if self.broken_off is None else f"{text} Broken off: {self.broken_off}"

    def to_dict(self) -> dict[str, Any]:
        """JSON form, documented in docs/check-report.md."""
        found = self.first
        return {
            "prompt_id": self.prompt_id,
            "phase": self.phase,
            "verdict": self.verdict.value,
            "first": None if found is None else found.arm,
            "sentence": self.sentence,
            "tallies": [asdict(tally) for tally in self.tallies],
            "broken_off": self.broken_off,
        }


def suspicious(judged: Sequence[Judged]) -> list[Judged]:
    """Judged requests to look into: the first of each prompt, at most `SUSPECTS_MAX`."""
    found: dict[str, Judged] = {}
    for item in judged:
        if item.judgement.verdict in SUSPICIOUS:
            found.setdefault(item.prompt.prompt_id, item)
    return list(found.values())[:SUSPECTS_MAX]


async def bisect(
    items: Sequence[Judged],
    means: Means,
    asking: Asking,
    *,
    run_id: str,
    new_run_id: Callable[[], str],
    repeats: int = REPEATS,
) -> list[Suspect]:
    """Ask suspicious prompts again in every arm that can be made, nearest first.

    What breaks off on the way is noted in the suspects: what was found until then is kept.

    Args:
        items: From `suspicious`.
        means: What arms are made of.
        asking: How the run asked and judged.
        run_id: The salt under which the run stored its blocks.
        new_run_id: Gives a salt that nobody used.
        repeats: Times that each arm is asked.
    """
    bisection = _Bisection(items, means, asking, repeats)
    try:
        await bisection.run(run_id, new_run_id)
    except KvkeepError as error:
        for suspect in bisection.suspects:
            suspect.broken_off = str(error)
    return bisection.suspects


class _Bisection:
    """One look at some prompts."""

    def __init__(self, items: Sequence[Judged], means: Means, asking: Asking, repeats: int) -> None:
        self._prompts = [item.prompt for item in items]
        self._means, self._asking, self._repeats = means, asking, repeats
        self._computed: list[Answer] = []
        self._reused: list[Answer] = []
        self.suspects = [
            Suspect(item.prompt.prompt_id, item.phase, item.judgement.verdict) for item in items
        ]

    async def run(self, run_id: str, new_run_id: Callable[[], str]) -> None:
        """Ask in all arms.

        Raises:
            KvkeepError: An arm can't be asked; those before it are counted.
        """
        near, names = ("cold", "cached"), self._means.names
        for arm in standard_arms(near, self._means, run_id=new_run_id()):
            await self._ask(arm, Blocks.NONE if arm.source is Source.NOWHERE else Blocks.ANEW)
        stored = [name for name in STORED if name in names]
        for arm in standard_arms(stored, self._means, run_id=run_id):
            if arm.name != "fill":
                await self._ask(arm, Blocks.OF_THE_RUN)
        # Under a third salt: what the arms above emptied is filled again.
        far = [name for name in names if name not in near]
        for arm in standard_arms(far, self._means, run_id=new_run_id()):
            if arm.name == "restart" and all(suspect.first for suspect in self.suspects):
                return
            await self._ask(arm, Blocks.NONE if arm.source is Source.NOWHERE else Blocks.ANEW)

    async def _ask(self, arm: Arm, blocks: Blocks) -> None:
        tallies = [Tally(arm.name, blocks) for _ in self.suspects]
        for suspect, tally in zip(self.suspects, tallies, strict=True):
            suspect.tallies.append(tally)
        # What is reused is computed in other shapes than what is not, and rounds otherwise: so, but
        # for the exact mode, reused answers are compared with the first that the engine kept.
        finds_reused = arm.name == "cached" and not self._asking.exact
        for once in _passes(arm, 1 if arm.name in ONCE else self._repeats):
            is_computed = arm.source is Source.NOWHERE or not self._reused
            reference = self._computed if is_computed else self._reused
            result = await run_arm(once, self._prompts, self._asking, reference or None)
            right = _count(result, tallies, _WRONG_BESIDE_ROUNDING if finds_reused else SUSPICIOUS)
            answers = result.phase.answers
            self._computed = self._computed or list(answers)
            if finds_reused and result.check.ok:
                self._reused = [
                    answers[idx] if idx in right else self._computed[idx]
                    for idx in range(len(answers))
                ]
                finds_reused = False


def _passes(arm: Arm, repeats: int) -> Iterator[Arm]:
    """The same arm some times, each under the conditions of the first."""
    for number in range(repeats):
        salt = f"{arm.salt}-{number}" if arm.salt_per_request else arm.salt
        before = arm.before
        is_kept = arm.source is Source.OUTSIDE and not arm.salt_per_request
        if before is None and is_kept:
            # The engine may have the blocks itself by now.
            before = partial(reset_of, arm.endpoint)
        yield replace(arm, salt=salt, before=before)


def _count(result: ArmResult, tallies: Sequence[Tally], wrong: Collection[Verdict]) -> list[int]:
    """Add the verdicts of one pass; returns the prompts whose answers are right."""
    # A pass that is its own reference has only the verdicts that failed.
    verdicts = {item.index: item.judgement.verdict for item in result.judged}
    right = []
    for idx, tally in enumerate(tallies):
        verdict = verdicts.get(idx, Verdict.IDENTICAL)
        tally.asked += 1
        tally.differed += verdict in wrong
        tally.unproven += verdict in UNPROVEN
        if verdict not in wrong and verdict not in UNPROVEN:
            right.append(idx)
    return right
