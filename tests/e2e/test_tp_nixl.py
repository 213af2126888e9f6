"""Stock engines of all tensor-parallel sizes that hand over by vLLM's NixlConnector; nightly.

NIXL's own threads never rest once two engines are connected: on two cores this takes its time.
"""

import itertools
from collections.abc import Iterator

import pytest

from kvkeep.router.handoff.transports.nixl import NixlTransport
from tests.e2e.pairs import read_metrics, since
from tests.e2e.tp_fleets import (
    NIXL_LEASE_S,
    TIMES_THE_FLOOR,
    Fleet,
    difference,
    running_fleet,
)
from tests.e2e.tp_kinds import KINDS, Kind, over_shapes, pairs_of, routed, show

NUM_LOADED = "vllm:external_prefix_cache_hits_total"
"""Tokens; an answer's ``cached_tokens`` leaves out those that NixlConnector has read."""

INTRODUCTIONS_MAX = 5

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900, func_only=True)]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def fleet(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """Every engine of a kind; nothing of kvkeep is in any."""
    kind: Kind = request.param
    folder, transport = tmp_path_factory.mktemp("nixl"), NixlTransport(lease_s=NIXL_LEASE_S)
    with running_fleet(
        folder, kind.make_model(), kind.sizes, kind.block_tokens, transport
    ) as found:
        for prefill, decode in itertools.permutations(kind.sizes, 2):
            _introduce(found, prefill, decode)
        yield found


def _introduce(fleet: Fleet, prefill: str, decode: str) -> None:
    """Have two engines exchange what NIXL has to know of them, which is done once.

    The decode engine waits for 5 s, whatever is set (vLLM 0.32, nixl/base_worker.py, RCVTIMEO), and
    fails the request then: ranks that poll on two cores may leave nobody the time to answer.
    """
    for salt in (fleet.salt() for _ in range(INTRODUCTIONS_MAX)):
        offered = fleet.offer(prefill, fleet.prompts[0], salt)
        try:
            fleet.take(decode, fleet.prompts[0], salt, offered)
        except AssertionError as refused:
            if "Internal server error" not in str(refused):
                raise
        else:
            return
    pytest.fail(f"{decode} and {prefill} never met")


def test_every_pair_of_sizes_hands_over(fleet: Fleet) -> None:
    """Bytes move, at most a block is computed, and answers are as near as the sizes are."""
    for prefill, decode in pairs_of(fleet.sizes):
        show(fleet, prefill, decode, _check_pair(fleet, prefill, decode))


def _check_pair(fleet: Fleet, prefill: str, decode: str) -> float:
    url, worst = fleet.stack.engines[decode].url, 0.0
    alone = fleet.cold(decode)
    before = read_metrics(url)
    for prompt, wanted in zip(fleet.prompts, alone, strict=True):
        salt = fleet.salt()
        answered = fleet.take(decode, prompt, salt, fleet.offer(prefill, prompt, salt))
        worst = max(worst, difference(wanted, answered))
    counted = since(before, read_metrics(url))
    assert counted["vllm:nixl_bytes_transferred_sum"] > 0
    assert counted.get("vllm:nixl_num_failed_transfers_total", 0) == 0
    assert counted[NUM_LOADED] == sum(map(len, fleet.prompts))
    assert worst <= TIMES_THE_FLOOR * fleet.floor()
    return worst


@over_shapes
def test_more_engines_of_a_role_than_one(
    fleet: Fleet, prefill: list[str], decode: list[str]
) -> None:
    """Whoever computed a prompt, and whoever answers, of sizes of their own, through the router."""
    if not {*prefill, *decode} <= fleet.sizes.keys():
        (prefill, decode) = ([name] for name in [*fleet.sizes][:2])
    ways = set()
    urls = [fleet.stack.engines[name].url for name in decode]
    before = [read_metrics(url)[NUM_LOADED] for url in urls]
    with routed(fleet, prefill, decode) as router:
        for idx, prompt in enumerate(fleet.prompts):
            answered = fleet.ask(router.url, prompt, fleet.salt())

            answerer = answered.route.split(";")[0].strip()
            ways.add((answered.route.partition("prefill=")[2].split()[0], answerer))
            assert "transport=nixl" in answered.route
            alone = fleet.cold(answerer)[idx]
            assert difference(alone, answered) <= TIMES_THE_FLOOR * fleet.floor()
    loaded = [read_metrics(url)[NUM_LOADED] for url in urls]
    assert sum(loaded) - sum(before) == sum(map(len, fleet.prompts))
    assert ways == set(itertools.product(prefill, decode))
