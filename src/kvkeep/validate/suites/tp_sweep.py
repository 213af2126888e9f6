"""Accuracy of a hand-off, for each combination of tensor-parallel sizes and block sizes of a pair.

Each fleet is started, compared as `kvkeep.validate.suites.pd_accuracy` does, and stopped before the
next. One that its stack refuses by name has not failed, for it can't answer wrong; one that starts
and is wrong, or does not come up, has.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from kvkeep.model.errors import InputError
from kvkeep.stack.machine import has_gpu
from kvkeep.stack.placement.assign import find_gpus
from kvkeep.stack.spec import StackSpec
from kvkeep.validate.settings import CheckSettings, Document
from kvkeep.validate.suite.base import (
    Context,
    Fleet,
    NotApplicable,
    NotStarted,
    Outcome,
    Suite,
    SuiteReport,
    Template,
)
from kvkeep.validate.suite.needs import OWN_FLEETS
from kvkeep.validate.suites.pd_accuracy import MAX_TOKENS, compare

NAME = "tp-sweep"
TP_SIZES = (1, 2)
"""Swept where nobody names sizes: those of the reference document."""
FLEETS_MAX = 64
"""Each takes minutes to start: more than these are a slip of the pen."""
NAME_CHARS_MAX = 40
"""Of the stack's name in a fleet's, which may have 63 characters in all."""


@dataclass(frozen=True, slots=True)
class Room:
    """What engines can have on a machine."""

    num_cores: int
    num_gpus: int | None
    """None: engines compute on its cores."""


@dataclass(frozen=True, slots=True)
class Side:
    """Engines of one role."""

    tensor_parallel: int
    block_tokens: int | None
    """None: as the template says."""

    @property
    def label(self) -> str:
        """In a few words."""
        blocks = "" if self.block_tokens is None else f", blocks of {self.block_tokens}"
        return f"TP {self.tensor_parallel}{blocks}"

    @property
    def fields(self) -> dict[str, int]:
        """Of an engine in a stack file."""
        blocks = {} if self.block_tokens is None else {"block_tokens": self.block_tokens}
        return {"tensor_parallel": self.tensor_parallel, **blocks}


def plan(
    template: Template, settings: CheckSettings, room: Room | None = None
) -> list[Fleet | NotStarted | NotApplicable]:
    """Every combination, in order: what is started, and what is not and why.

    Args:
        template: A pair, or several prefill and decode engines.
        settings: Name the sizes.
        room: Of the machine; this one's if left out.

    Raises:
        InputError: The template is wrong in itself, or there are too many combinations.
    """
    base = template({})
    reason = _why_no_pair(base)
    if reason is not None:
        return [NotApplicable(NAME, reason)]
    pairs = list(_pairs(settings))
    if len(pairs) > FLEETS_MAX:
        raise InputError(
            f"These sizes make {len(pairs)} pairs, at most {FLEETS_MAX} are swept: name fewer with "
            "--sweep-prefill-tp, --sweep-decode-tp, --sweep-prefill-blocks, --sweep-decode-blocks."
        )
    room = room or _room_here()
    return [_planned(template, base, prefill, decode, room) for prefill, decode in pairs]


def _why_no_pair(base: StackSpec) -> str | None:
    running = next((engine.name for engine in base.engines if engine.url is not None), None)
    if running is not None:
        return (
            f"It starts engines of several sizes, and engine {running} runs already: leave its url "
            "out of the stack file."
        )
    if not {"prefill", "decode"} <= {engine.role for engine in base.engines}:
        return (
            "It starts pairs of engines: give a stack file whose engines have the roles prefill "
            "and decode."
        )
    return None


def _pairs(settings: CheckSettings) -> Iterator[tuple[Side, Side]]:
    prefill = _sides(
        settings.sweep_prefill_tp, settings.prefill_tp_size, settings.sweep_prefill_blocks
    )
    decode = _sides(settings.sweep_decode_tp, settings.decode_tp_size, settings.sweep_decode_blocks)
    return itertools.product(prefill, decode)


def _sides(tp_sizes: Sequence[int], named: int, blocks: Sequence[int]) -> list[Side]:
    sizes = dict.fromkeys(tp_sizes or sorted({*TP_SIZES, named}))
    return [Side(size, each) for each in dict.fromkeys(blocks) or (None,) for size in sizes]


def _room_here() -> Room:
    return Room(len(os.sched_getaffinity(0)), len(find_gpus()) if has_gpu() else None)


def _planned(
    template: Template, base: StackSpec, prefill: Side, decode: Side, room: Room
) -> Fleet | NotStarted:
    def left_out(outcome: Outcome, reason: str) -> NotStarted:
        return NotStarted(NAME, prefill.label, decode.label, outcome.value, reason)

    sides = {"prefill": prefill, "decode": decode}
    too_large = _why_too_large(base, sides, room)
    if too_large is not None:
        return left_out(Outcome.NOT_APPLICABLE, too_large)
    try:
        spec = template({role: side.fields for role, side in sides.items()})
    except InputError as error:
        return left_out(Outcome.REFUSED, str(error))
    return Fleet(prefill.label, decode.label, _apart(spec, prefill, decode))


def _why_too_large(base: StackSpec, sides: dict[str, Side], room: Room) -> str | None:
    """Why a machine has no room for a pair; what its stack would say is left to it."""
    ranks = [sides[e.role].tensor_parallel for e in base.engines if e.role in sides]
    if room.num_gpus is None:
        if max(ranks) > room.num_cores:
            return (
                f"An engine of {max(ranks)} ranks needs as many cores, and this machine has "
                f"{room.num_cores}: sweep smaller sizes, or use a larger machine."
            )
        return None
    names_gpus = any(engine.gpus is not None for engine in base.engines)
    if not names_gpus and sum(ranks) > room.num_gpus:
        return (
            f"It needs {sum(ranks)} GPUs, and this machine has {room.num_gpus}: sweep smaller "
            "sizes, or use a larger machine."
        )
    return None


def _apart(spec: StackSpec, prefill: Side, decode: Side) -> StackSpec:
    """A name and a folder of its own, and nothing left for the next."""
    suffix = f"tp{prefill.tensor_parallel}-{decode.tensor_parallel}"
    if prefill.block_tokens is not None or decode.block_tokens is not None:
        suffix += f"-b{prefill.block_tokens or 0}-{decode.block_tokens or 0}"
    return msgspec.structs.replace(
        spec,
        name=f"{spec.name[:NAME_CHARS_MAX]}-{suffix}",
        state_dir=str(spec.state_path / suffix),
        daemon=msgspec.structs.replace(spec.daemon, keep_pool=False),
    )


async def run(context: Context) -> list[SuiteReport]:
    """One report about the fleet that is up."""
    fleet = context.fleet
    assert fleet is not None
    report = context.new_report(NAME, fleet.mode, MAX_TOKENS)
    await compare(context, report, is_uneven=fleet.prefill != fleet.decode)
    return [report]


SUITE = Suite(
    name=NAME,
    title="Starts pairs of several sizes one by one, and compares each with one engine.",
    proves="Engines of unlike sizes hand prompts over right, or say by name why they can't.",
    document=Document.HAND_OFF,
    run=run,
    aliases=("tp_config_sweep_test",),
    needs=(OWN_FLEETS,),
    settings=(
        "sweep_prefill_tp",
        "sweep_decode_tp",
        "sweep_prefill_blocks",
        "sweep_decode_blocks",
    ),
    needs_router=True,
    needs_pair=True,
    fleets=plan,
    small_s=180.0,
)
