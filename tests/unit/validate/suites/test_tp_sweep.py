"""The sweep over pairs: what it starts and leaves out, and what it says of one that is up."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvkeep.model.errors import InputError
from kvkeep.stack.precedence import make_spec
from kvkeep.stack.spec import StackSpec
from kvkeep.testing.fake_kv import Faults
from kvkeep.validate.settings import CheckSettings, Document, resolve
from kvkeep.validate.suite.base import Fleet, NotApplicable, NotStarted, Template
from kvkeep.validate.suites.tp_sweep import FLEETS_MAX, NAME, Room, plan, run
from tests.unit.validate.conftest import Connect, MakeContext
from tests.unit.validate.suites.fake_pairs import FakePair

pytestmark = pytest.mark.usefixtures("no_pauses")

CORES = Room(num_cores=4, num_gpus=None)
PAIR = [{"name": "p", "role": "prefill"}, {"name": "d", "role": "decode"}]


def template_of(engines: list[dict[str, Any]], **more: Any) -> Template:
    """As a stack file would be one."""

    def make(by_role: Mapping[str, Mapping[str, int]]) -> StackSpec:
        sized = [{**engine, **by_role.get(engine.get("role", ""), {})} for engine in engines]
        values = {"name": "pair", "router": {}, "engines": sized, **more}
        return make_spec(values, environment={})

    return make


def planned(
    engines: list[dict[str, Any]] = PAIR, room: Room = CORES, **sizes: Any
) -> list[Fleet | NotStarted | NotApplicable]:
    return plan(template_of(engines), CheckSettings(**sizes), room)


def modes(found: list[Fleet | NotStarted | NotApplicable]) -> list[str]:
    return [each.mode for each in found if not isinstance(each, NotApplicable)]


def left_out(found: list[Fleet | NotStarted | NotApplicable]) -> dict[str, tuple[str, str]]:
    """Outcome and reason of what is not started, by its mode."""
    missing = [each for each in found if isinstance(each, NotStarted)]
    return {each.mode: (each.outcome, each.reason) for each in missing}


# ---- what is started


def test_every_combination_is_swept() -> None:
    """One and two ranks on each side where nobody says otherwise; engines get what is named."""
    found = planned()

    assert modes(found) == ["TP 1 to TP 1", "TP 1 to TP 2", "TP 2 to TP 1", "TP 2 to TP 2"]
    specs = [each.spec for each in found if isinstance(each, Fleet)]
    assert [[engine.tensor_parallel for engine in spec.engines] for spec in specs] == [
        [1, 1], [1, 2], [2, 1], [2, 2],
    ]  # fmt: skip


def test_sizes_of_the_documents_variables_are_swept_too() -> None:
    """PREFILLER_TP_SIZE and DECODER_TP_SIZE name a size more; a list names all of them."""
    variables = {"PREFILLER_TP_SIZE": "4"}
    settings = resolve({}, variables, documents=(Document.HAND_OFF,))
    named = replace(settings, sweep_decode_tp=(2, 2))

    assert modes(plan(template_of(PAIR), named, CORES)) == [
        "TP 1 to TP 2",
        "TP 2 to TP 2",
        "TP 4 to TP 2",
    ]


def test_block_sizes_are_swept_where_they_are_named() -> None:
    """Each with each; without a name they stay as the template has them."""
    engines = [{**engine, "connector": "nixl"} for engine in PAIR]
    found = planned(
        engines, sweep_prefill_tp=(1,), sweep_decode_tp=(2,), sweep_decode_blocks=(32, 64)
    )

    assert modes(found) == ["TP 1 to TP 2, blocks of 32", "TP 1 to TP 2, blocks of 64"]
    specs = [each.spec for each in found if isinstance(each, Fleet)]
    assert [[engine.block_tokens for engine in spec.engines] for spec in specs] == [
        [32, 32], [32, 64],
    ]  # fmt: skip


def test_each_fleet_has_a_name_and_a_folder_of_its_own(tmp_path: Path) -> None:
    """And keeps nothing for the next one to find."""
    template = template_of(PAIR, state_dir=str(tmp_path), daemon={"keep_pool": True})

    found = plan(template, CheckSettings(sweep_decode_blocks=(32,)), CORES)
    specs = [each.spec for each in found if isinstance(each, Fleet)]

    assert len({spec.name for spec in specs}) == len({spec.state_path for spec in specs}) == 4
    assert all(spec.state_path.parent == tmp_path for spec in specs)
    assert not any(spec.daemon.keep_pool for spec in specs)


# ---- what is not, and why


def test_what_the_machine_has_no_room_for_is_left_out() -> None:
    """A rank needs a core of its own; fleets that fit are swept all the same."""
    found = planned(room=Room(1, None), sweep_decode_tp=(1,))

    outcome, reason = left_out(found)["TP 2 to TP 1"]
    assert modes([each for each in found if isinstance(each, Fleet)]) == ["TP 1 to TP 1"]
    assert outcome == "not-applicable"
    assert "2 ranks needs as many cores, and this machine has 1" in reason


def test_gpus_are_counted_over_all_engines() -> None:
    """Two prefill engines and a decode engine; where the file names GPUs its stack decides."""
    engines = [*PAIR, {"name": "p2", "role": "prefill"}]
    room = Room(64, 3)

    assert left_out(planned(engines, room, sweep_prefill_tp=(1, 2), sweep_decode_tp=(1,))) == {
        "TP 2 to TP 1": (
            "not-applicable",
            "It needs 5 GPUs, and this machine has 3: sweep smaller sizes, or use a larger "
            "machine.",
        )
    }
    named = [{**engine, "gpus": [0]} for engine in engines]
    assert left_out(planned(named, room, sweep_prefill_tp=(8,), sweep_decode_tp=(1,))) == {}


def test_what_the_stack_refuses_by_name_is_refused() -> None:
    """Engines of one pool need blocks of one size: the sentence is the stack's own."""
    found = planned(
        sweep_prefill_tp=(1,),
        sweep_decode_tp=(1,),
        sweep_prefill_blocks=(32,),
        sweep_decode_blocks=(32, 64),
    )

    ((mode, (outcome, reason)),) = left_out(found).items()
    assert (mode, outcome) == ("TP 1, blocks of 32 to TP 1, blocks of 64", "refused")
    assert "engines[1].block_tokens = 64: engines[0] has 32" in reason


@pytest.mark.parametrize(
    ("engines", "why"),
    [
        ([{"name": "a"}], "roles prefill and decode"),
        ([PAIR[0], {**PAIR[1], "url": "http://127.0.0.1:9999"}], "engine d runs already"),
    ],
)
def test_a_template_that_is_no_pair_to_start_does_not_apply(
    engines: list[dict[str, Any]], why: str
) -> None:
    """In a group that is no failure; the sentence says what to change."""
    (report,) = planned(engines)

    assert isinstance(report, NotApplicable)
    assert why in report.reason


def test_too_many_combinations_are_refused() -> None:
    """A slip of the pen would take a day."""
    sizes = tuple(range(1, FLEETS_MAX + 2))

    with pytest.raises(InputError, match="65 pairs, at most 64"):
        planned(sweep_prefill_tp=sizes, sweep_decode_tp=(1,))


# ---- what is said of a fleet that is up


async def checked(
    make_context: MakeContext, connect: Connect, pair: FakePair, decode: str = "TP 2"
) -> Any:
    async with pair.router() as router:
        context = await make_context(
            pair.decode,
            front=router,
            prefill=(connect(pair.prefill),),
            decode=(connect(pair.decode),),
        )
        spec = template_of(PAIR)({})
        (report,) = await run(replace(context, fleet=Fleet("TP 1", decode, spec)))
    return report


async def test_a_pair_that_hands_over_passes(make_context: MakeContext, connect: Connect) -> None:
    """Its report says which fleet it was; how far the two sizes lie apart counts as noise."""
    report = await checked(make_context, connect, FakePair())

    assert (report.suite, report.mode, report.outcome) == (NAME, "TP 1 to TP 2", "passed")
    assert "a prefill engine" in [phase.name for phase in report.phases]


async def test_equal_sizes_have_no_noise_between_them(
    make_context: MakeContext, connect: Connect
) -> None:
    """Then only the decode engine itself is asked what two computed answers differ by."""
    report = await checked(make_context, connect, FakePair(), decode="TP 1")

    assert report.outcome == "passed"
    assert "a prefill engine" not in [phase.name for phase in report.phases]


async def test_recomputing_is_not_exercised(make_context: MakeContext, connect: Connect) -> None:
    """A pair of other sizes that silently computes everything again does not pass."""
    pair = FakePair()
    pair.hands_over = False

    assert (await checked(make_context, connect, pair)).outcome == "not-exercised"


@pytest.mark.parametrize("faults", [Faults(flip_every=3), Faults(swap=True)])
async def test_wrong_blocks_fail(
    make_context: MakeContext, connect: Connect, faults: Faults
) -> None:
    """The noise between sizes does not hide blocks that arrive damaged, or are another prompt's."""
    assert (await checked(make_context, connect, FakePair(faults))).outcome == "failed"
