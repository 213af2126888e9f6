"""Plants every kind of fault, asks again, and counts what was refused and what was caught.

Two scores. *Store*: faults below verification, which has to refuse each of them, so that every
answer stays right. *Suites*: faults behind verification, which only the answers can show. At last
nothing is planted: prompts that no fault struck and no noise floor was measured on are asked twice,
and a verdict that fails there is a false alarm.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any, Protocol

from kvkeep.model.errors import UnavailableError
from kvkeep.model.ids import BlockKey
from kvkeep.validate.self_test.faults import (
    BLOCK_SIZED,
    FROM_ANOTHER,
    Block,
    Donors,
    PlantedFault,
    spoiled,
)
from kvkeep.validate.self_test.planting import PlantedPool
from kvkeep.validate.statistics import CONFIDENCE, rate_max
from kvkeep.validate.verdict import PASSING, Judgement

REFILLS_MAX = 3
"""Replays that may be needed until refused blocks are stored again."""

Told = Callable[[str, int, int], None]
"""What is done, how much of it, and of how much."""


@dataclass(frozen=True, slots=True)
class Replay:
    """The answers to all prompts, asked once more."""

    judgements: tuple[Judgement, ...]
    """One for each prompt."""
    num_refused: int
    """Blocks that verification refused meanwhile."""
    is_whole: bool
    """Every block that could be loaded was lent and either arrived or was refused."""


class Stand(Protocol):
    """What faults are planted in: a stack, or a simulation of one."""

    @property
    def name(self) -> str:
        """In tables and reports."""
        ...

    @property
    def is_exact(self) -> bool:
        """Whether equal bytes give equal bits, so that every large fault has to show."""
        ...

    @property
    def prompts(self) -> Sequence[Sequence[BlockKey]]:
        """Blocks of each prompt that a replay loads and attends to."""
        ...

    @property
    def foreign(self) -> Sequence[BlockKey]:
        """Blocks of somebody else."""
        ...

    async def settle(self) -> PlantedPool:
        """Forget what the engine itself has, wait until nobody moves blocks; returns the pool."""
        ...

    async def ask_again(self) -> Replay:
        """Ask all prompts, which load what the pool has."""
        ...

    @property
    def num_floor_prompts(self) -> int:
        """Prompts that the noise floor was measured on; 0 where there is none."""
        ...

    async def ask_held_out(self, num: int) -> Replay:
        """Ask up to ``num`` prompts twice that are none of the others, and judge the second answer.

        No prompt is asked in two calls, as long as there are others. It may push blocks of the
        other prompts out of the pool.
        """
        ...


@dataclass(slots=True)
class FaultScore:
    """How one kind of fault fared."""

    fault: PlantedFault
    planted: int = 0
    caught: int = 0
    wrong_answers: int = 0
    """Below verification: answers that a fault changed nevertheless; none may be."""
    not_loaded: int = 0
    """Planted in a replay that did not load everything, which proves nothing."""

    @property
    def rate(self) -> float | None:
        """Caught of planted; None if none was planted."""
        return self.caught / self.planted if self.planted else None


@dataclass(slots=True)
class StandScore:
    """Everything that was counted on one stand."""

    stand: str
    exact: bool
    """Judged to the bit. If not, catches are rates, and answers may differ by rounding."""
    store: list[FaultScore] = field(default_factory=list)
    suites: list[FaultScore] = field(default_factory=list)
    pairs: int = 0
    """Prompts that were asked twice without a fault."""
    pairs_not_loaded: int = 0
    """Of those, in a replay that did not load everything, which proves nothing."""
    floor_prompts: int = 0
    """Other prompts, on which the noise floor was measured."""
    false_alarms: int = 0
    """Of those, and of prompts beside planted ones, verdicts that did not pass."""
    alarms: list[str] = field(default_factory=list)
    """What was said about each false alarm."""

    @property
    def false_alarm_rate_max(self) -> float:
        """With 95 % confidence false alarms are no more frequent than this, of 1."""
        return rate_max(self.false_alarms, self.pairs, CONFIDENCE)

    @property
    def passed(self) -> bool:
        """Every fault below was refused, every block-sized one behind was caught, no false alarm.

        A kind that can't be made on this stand is no failure as long as others were.
        """
        large = [each for each in self.suites if each.fault in BLOCK_SIZED]
        is_shown = not self.exact or (
            all(each.caught == each.planted for each in large)
            and not any(each.wrong_answers for each in self.store)
        )
        return (
            is_shown
            and not self.false_alarms
            and not self.pairs_not_loaded
            and all(each.caught == each.planted for each in self.store)
            and any(each.planted for each in self.store)
            and any(each.planted for each in self.suites)
            and not any(each.not_loaded for each in [*self.store, *self.suites])
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form, documented in docs/check-report.md."""
        bound = {"false_alarm_rate_max": self.false_alarm_rate_max}
        return {**asdict(self), **bound, "passed": self.passed}


async def score(
    stand: Stand, *, rounds: int, pairs: int, seed: int, told: Told = lambda *_: None
) -> StandScore:
    """Plant every fault ``rounds`` times in each prompt, below and behind verification.

    Args:
        stand: Filled: every prompt was asked once, and its blocks are stored.
        rounds: Replays for each kind of fault on each side.
        pairs: Prompts that are asked twice without a fault, in the end.
        seed: Decides bits.
        told: How far it is.

    Raises:
        UnavailableError: What was refused is not stored again, or the stand does not answer.
    """
    found, chance = StandScore(stand.name, stand.is_exact), Random(seed)
    found.floor_prompts = stand.num_floor_prompts
    turn = 0
    for is_sealed, scores in ((False, found.store), (True, found.suites)):
        side = "behind verification" if is_sealed else "below verification"
        for number, fault in enumerate(PlantedFault):
            scores.append(FaultScore(fault))
            for _ in range(rounds):
                await _strike(stand, scores[-1], found, chance, (turn, is_sealed))
                turn += 1
            told(side, number + 1, len(PlantedFault))
    while found.pairs < pairs:
        replay = await stand.ask_held_out(pairs - found.pairs)
        _count_alarms(found, replay, f"pairs from {found.pairs + 1} on", struck=frozenset())
        found.pairs += len(replay.judgements)
        found.pairs_not_loaded += 0 if replay.is_whole else len(replay.judgements)
        told("no fault", found.pairs, pairs)
    return found


async def _strike(
    stand: Stand, scored: FaultScore, found: StandScore, chance: Random, how: tuple[int, bool]
) -> None:
    """Plant one fault in each prompt, ask again, and heal."""
    is_sealed = how[1]
    pool = await _refilled(stand)
    struck = _plant(pool, stand, scored.fault, chance, how)
    try:
        replay = await stand.ask_again()
    finally:
        pool.heal()
    scored.planted += len(struck)
    if not replay.is_whole or (is_sealed and replay.num_refused):
        scored.not_loaded += len(struck)
    failed = {idx for idx in struck if replay.judgements[idx].verdict not in PASSING}
    if is_sealed:
        scored.caught += len(failed)
    else:
        scored.caught += min(replay.num_refused, len(struck))
        scored.wrong_answers += len(failed)
    _count_alarms(found, replay, f"beside {scored.fault.value}", struck=struck)


async def _refilled(stand: Stand) -> PlantedPool:
    """The pool with every block of every prompt in it: what was refused has to be stored again."""
    for _ in range(REFILLS_MAX):
        pool = await stand.settle()
        slots = pool.slots()
        if all(key in slots for keys in stand.prompts for key in keys):
            return pool
        await stand.ask_again()
    raise UnavailableError("Blocks that were refused are not stored again: is the pool too small?")


def _plant(
    pool: PlantedPool, stand: Stand, fault: PlantedFault, chance: Random, how: tuple[int, bool]
) -> frozenset[int]:
    """Spoil one block of each prompt; returns the prompts in which that could be done."""
    turn, is_sealed = how
    slots = pool.slots()
    blocks: dict[int, tuple[int, Block]] = {}
    for idx, keys in enumerate(stand.prompts):
        place = (turn + idx) % len(keys)
        donors = _donors(pool, slots, stand, idx, place)
        wrong = spoiled(fault, pool.block(slots[keys[place]]), donors, chance)
        if wrong is not None:
            blocks[idx] = slots[keys[place]], wrong
    # All are read before any is written: a swapped block is whole, not one that was spoiled itself.
    for slot, wrong in blocks.values():
        pool.plant(slot, wrong, is_sealed=is_sealed, has_digests=fault in FROM_ANOTHER)
    return frozenset(blocks)


def _donors(
    pool: PlantedPool, slots: dict[BlockKey, int], stand: Stand, idx: int, place: int
) -> Donors:
    own, next_one = stand.prompts[idx], stand.prompts[(idx + 1) % len(stand.prompts)]

    def block(keys: Sequence[BlockKey], at: int) -> Block | None:
        return pool.block(slots[keys[at]]) if at < len(keys) and keys[at] in slots else None

    return Donors(
        neighbor=block(next_one, place) if next_one is not own else None,
        earlier=block(own, place - 1 if place else len(own) - 1),
        foreign=block(stand.foreign, place),
    )


def _count_alarms(found: StandScore, replay: Replay, where: str, *, struck: frozenset[int]) -> None:
    for idx, judgement in enumerate(replay.judgements):
        if idx not in struck and judgement.verdict not in PASSING:
            found.false_alarms += 1
            found.alarms.append(
                f"{where}, prompt {idx + 1}: {judgement.verdict}. {judgement.reason}"
            )
