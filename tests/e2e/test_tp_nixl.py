"""Stock engines of two tensor-parallel sizes that hand over by vLLM's NixlConnector; nightly.

NIXL's own threads never rest once two engines are connected: on two cores this takes its time.
"""

from collections.abc import Iterator

import pytest

from kvkeep.router.handoff.transports.nixl import NixlTransport
from tests.e2e.pairs import read_metrics, since
from tests.e2e.random_llama import make_random_llama
from tests.e2e.tp_fleets import TIMES_THE_FLOOR, Fleet, difference, running_fleet

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600, func_only=True)]


@pytest.fixture(scope="module", params=[32, 128])
def fleet(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """One rank, and two ranks."""
    folder = tmp_path_factory.mktemp("nixl")
    sizes, transport = {"a1": 1, "a2": 2}, NixlTransport(lease_s=30.0)
    with running_fleet(folder, str(make_random_llama()), sizes, request.param, transport) as found:
        yield found


@pytest.mark.parametrize(("prefill", "decode"), [("a1", "a2"), ("a2", "a1")])
def test_stock_engines_of_two_sizes_hand_over(fleet: Fleet, prefill: str, decode: str) -> None:
    """Bytes move, less than a block is computed, and answers are as near as the sizes are."""
    url, worst = fleet.stack.engines[decode].url, 0.0
    alone = fleet.cold(decode)
    before = read_metrics(url)
    for prompt, wanted in zip(fleet.prompts, alone, strict=True):
        salt = fleet.salt()
        answered = fleet.take(decode, prompt, salt, fleet.offer(prefill, prompt, salt))
        assert answered.num_computed <= fleet.block_tokens
        worst = max(worst, difference(wanted, answered))

    counted = since(before, read_metrics(url))
    assert counted["vllm:nixl_bytes_transferred_sum"] > 0
    assert counted.get("vllm:nixl_num_failed_transfers_total", 0) == 0
    print(f"{prefill} to {decode}: {worst:.3g} nat, the sizes themselves {fleet.floor():.3g}")
    assert worst <= TIMES_THE_FLOOR * fleet.floor()
