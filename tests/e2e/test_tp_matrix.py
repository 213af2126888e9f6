"""All pairs of tensor-parallel sizes and block sizes, and more than two engines; nightly."""

import itertools
from collections.abc import Iterator

import pytest

from tests.e2e.tp_fleets import (
    TIMES_THE_FLOOR,
    Fleet,
    check_bytes,
    check_pair,
    check_swapped_head,
    difference,
    running_fleet,
)
from tests.e2e.tp_kinds import KINDS, Kind, over_shapes, pairs_of, routed, show

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600, func_only=True)]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def fleet(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """Every engine of a kind, on one daemon."""
    kind: Kind = request.param
    folder = tmp_path_factory.mktemp("matrix")
    with running_fleet(folder, kind.make_model(), kind.sizes, kind.block_tokens) as found:
        yield found


def test_every_pair_of_sizes_hands_over(fleet: Fleet) -> None:
    """Ranks hold what others wrote to the bit; equal sizes answer alike to the bit as well."""
    for prefill, decode in pairs_of(fleet.sizes):
        show(fleet, prefill, decode, check_pair(fleet, prefill, decode))


def test_a_swapped_head_is_seen_in_every_pair(fleet: Fleet) -> None:
    """It leads further away than the sizes are from each other, twice."""
    for prefill, decode in pairs_of(fleet.sizes):
        show(fleet, prefill, decode, check_swapped_head(fleet, prefill, decode))


@over_shapes
def test_more_engines_of_a_role_than_one(
    fleet: Fleet, prefill: list[str], decode: list[str]
) -> None:
    """Whoever computed a prompt, and whoever answers, of sizes of their own, through the router."""
    if not {*prefill, *decode} <= fleet.sizes.keys():
        (prefill, decode) = ([name] for name in [*fleet.sizes][:2])
    ways = set()
    with routed(fleet, prefill, decode) as router:
        for idx, prompt in enumerate(fleet.prompts):
            before = {name: fleet.held(name, "loaded").keys() for name in decode}

            answered = fleet.ask(router.url, prompt, fleet.salt())

            answerer = answered.route.split(";")[0].strip()
            computer = answered.route.partition("prefill=")[2].split()[0]
            ways.add((computer, answerer))
            assert "transport=pool" in answered.route
            assert answered.num_computed <= fleet.block_tokens
            num_blocks = (len(prompt) - 1) // fleet.block_tokens
            check_bytes(fleet, computer, answerer, before[answerer], num_blocks)
            alone = fleet.cold(answerer)[idx]
            assert difference(alone, answered) <= TIMES_THE_FLOOR * fleet.floor()
    assert ways == set(itertools.product(prefill, decode))
