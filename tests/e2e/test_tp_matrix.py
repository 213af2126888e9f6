"""All pairs of tensor-parallel sizes and block sizes, and more than two engines; nightly."""

import contextlib
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.pairs import Router
from tests.e2e.random_llama import make_random_llama
from tests.e2e.tp_fleets import (
    TIMES_THE_FLOOR,
    Fleet,
    check_bytes,
    check_pair,
    check_swapped_head,
    difference,
    running_fleet,
)
from tests.integration.routers import ROUTE, wait_for

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600, func_only=True)]

MIN_TOKENS = 24
"""Shorter prompts are not handed off."""
PAIR_SIZES = {"a1": 1, "b1": 1, "a2": 2, "b2": 2}


@dataclass(frozen=True)
class Kind:
    """What a fleet is made of."""

    model: str
    """``random``, or as a stack file names it."""
    sizes: Mapping[str, int]
    block_tokens: int

    def __str__(self) -> str:
        return f"{self.model}-{self.block_tokens}"


# Heads of SmolLM2 divide by three only: on two cores three ranks get in each other's way.
KINDS = [
    *(Kind("random", PAIR_SIZES, block_tokens) for block_tokens in (32, 64, 128)),
    Kind("random", {"a1": 1, "a2": 2}, 256),
    Kind("smollm2", {"a1": 1, "a3": 3}, 32),
]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def fleet(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """Every engine of a kind, on one daemon."""
    kind: Kind = request.param
    folder = tmp_path_factory.mktemp("matrix")
    model = str(make_random_llama()) if kind.model == "random" else kind.model
    with running_fleet(folder, model, kind.sizes, kind.block_tokens) as found:
        yield found


def pairs_of(sizes: Mapping[str, int]) -> list[tuple[str, str]]:
    """Two engines for every pair of sizes that there is."""
    found: dict[tuple[int, int], tuple[str, str]] = {}
    for prefill, decode in itertools.permutations(sizes, 2):
        found.setdefault((sizes[prefill], sizes[decode]), (prefill, decode))
    return list(found.values())


def show(fleet: Fleet, prefill: str, decode: str, worst: float) -> None:
    """For the figures in docs/hand-off.md; shown with ``-s``."""
    pair = f"TP {fleet.sizes[prefill]}/{fleet.sizes[decode]}, blocks of {fleet.block_tokens}"
    print(f"{pair}: {worst:.3g} nat, the sizes themselves {fleet.floor():.3g}")


def test_every_pair_of_sizes_hands_over(fleet: Fleet) -> None:
    """Ranks hold what others wrote to the bit; equal sizes answer alike to the bit as well."""
    for prefill, decode in pairs_of(fleet.sizes):
        show(fleet, prefill, decode, check_pair(fleet, prefill, decode))


def test_a_swapped_head_is_seen_in_every_pair(fleet: Fleet) -> None:
    """It leads further away than the sizes are from each other, twice."""
    for prefill, decode in pairs_of(fleet.sizes):
        show(fleet, prefill, decode, check_swapped_head(fleet, prefill, decode))


@contextlib.contextmanager
def routed(fleet: Fleet, prefill: Sequence[str], decode: Sequence[str]) -> Iterator[Router]:
    """A router that hands over from some engines to others, each in its turn."""
    roles = {**dict.fromkeys(prefill, "prefill"), **dict.fromkeys(decode, "decode")}
    settings = {
        "engines": [
            {"name": name, "url": fleet.stack.engines[name].url, "role": role}
            for name, role in roles.items()
        ],
        "port": 0,
        "health": {"timeout_s": 20.0},
        "handoff": {
            "transport": "pool",
            "min_tokens": MIN_TOKENS,
            "decode_policy": "round_robin",
        },
    }
    with tempfile.TemporaryDirectory(prefix="kvkeep-test-") as folder:
        config = Path(folder) / "router.yaml"
        config.write_text(json.dumps(settings))
        router = Router([*ROUTE, "--config", str(config)])
        try:
            wait_for(router, lambda told: told["gauges"]["endpoints_ready"] == len(roles))
            yield router
        finally:
            router.stop()


SHAPES = [
    (["a1"], ["b1", "a2"]),
    (["a2"], ["b2", "a1"]),
    (["a1", "a2"], ["b1"]),
    (["a2", "a1"], ["b2"]),
]


@pytest.mark.parametrize(
    ("prefill", "decode"), SHAPES, ids=[f"{'+'.join(p)}-to-{'+'.join(d)}" for p, d in SHAPES]
)
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
