"""What fleets of unequal tensor-parallel sizes are made of, and the routers before them."""

import contextlib
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvkeep.router.handoff.transports.nixl import NixlTransport
from tests.e2e.pairs import Router
from tests.e2e.random_llama import make_random_llama
from tests.e2e.tp_fleets import REQUEST_TIMEOUT_S, Fleet
from tests.integration.routers import ROUTE, wait_for

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

    def make_model(self) -> str:
        """As a stack file names it, and there."""
        return str(make_random_llama()) if self.model == "random" else self.model

    def __str__(self) -> str:
        return f"{self.model}-{self.block_tokens}"


# Heads of SmolLM2 divide by three only: on two cores three ranks get in each other's way.
KINDS = [
    *(Kind("random", PAIR_SIZES, block_tokens) for block_tokens in (32, 64, 128)),
    Kind("random", {"a1": 1, "a2": 2}, 256),
    Kind("smollm2", {"a1": 1, "a3": 3}, 32),
]


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
            "transport": "nixl" if isinstance(fleet.transport, NixlTransport) else "pool",
            # Ranks that poll share two cores: a prompt may take a minute.
            "prefill_timeout_s": REQUEST_TIMEOUT_S,
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
over_shapes = pytest.mark.parametrize(
    ("prefill", "decode"), SHAPES, ids=[f"{'+'.join(p)}-to-{'+'.join(d)}" for p, d in SHAPES]
)
