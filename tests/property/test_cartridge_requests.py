"""Whatever happens around a request, tokens that stand for a cartridge are not computed."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_manager import KVCacheBlocks

from kvkeep.connector.metadata import DepositJob
from tests.unit.connector.cartridges.serving import ServingEngine, cartridge_hashes
from tests.unit.connector.engines import BLOCK_TOKENS

NUM_TOKENS = 64
PREPENDED: dict[str, Any] = {"cartridge_mode": "prepend", "cartridge_tokens": NUM_TOKENS}
EVENTS = st.sampled_from(
    ["daemon goes", "daemon comes", "evicted", "brought", "half brought", "failed", "time",
     "reset", "lookup", "lookup", "lookup"]
)  # fmt: skip


class Around:
    """An engine, and all that can happen to it while requests wait."""

    def __init__(self) -> None:
        self.engine = ServingEngine()
        self.jobs: list[DepositJob] = []

    def happen(self, event: str) -> None:
        """One thing."""
        engine = self.engine
        self.jobs += engine.idle_step().deposits
        match event:
            case "daemon goes":
                engine.fake.is_connected = False
            case "daemon comes":
                engine.fake.is_connected = True
            case "evicted":
                engine.fake.slots.clear()
            case "brought" if self.jobs:
                engine.deposited(self.jobs.pop())
            case "half brought" if self.jobs:
                engine.deposited(self.jobs.pop(), holds=False)
                engine.fake.hold(cartridge_hashes(2))
            case "failed" if self.jobs:
                engine.deposited(self.jobs.pop(), error="why ever")
            case "time":
                engine.clock.s += 20.0
            case "reset":
                engine.side.reset()

    def lookup(self, request: Any, num_local: int, share: int) -> bool:
        """What vLLM does with a waiting request; whether that went well.

        Args:
            request: Waiting.
            num_local: Blocks that vLLM's own cache has of it.
            share: Tenths of the claim that it takes.
        """
        side = self.engine.side
        num_computed = num_local * BLOCK_TOKENS
        claim = side.match(request, num_computed)
        if claim is None:
            return False
        num_blocks = claim // BLOCK_TOKENS
        # vLLM takes a claim, or less of it, but not nothing of something (0.32, scheduler.py).
        taken = claim if share >= 10 else max(num_blocks * share // 10, min(1, num_blocks))
        taken = taken if share >= 10 else taken * BLOCK_TOKENS
        assert num_computed + claim < request.num_tokens
        table = self.engine.pool.get_new_blocks(-(-request.num_tokens // BLOCK_TOKENS))
        is_planned = side.allocated(request, KVCacheBlocks((table,)), taken)
        self.engine.pool.free_blocks(reversed(table))
        if is_planned:
            # What vLLM computes begins here.
            assert num_computed + taken >= NUM_TOKENS
        metadata = self.engine.idle_step()
        self.jobs += metadata.deposits
        self.engine.end(metadata)
        # Else the plug-in has a load fail, which ends the request.
        assert is_planned or taken
        return is_planned


@given(
    st.lists(st.tuples(EVENTS, st.integers(0, 4), st.sampled_from([10, 10, 10, 1, 5])), max_size=30)
)
def test_placeholders_are_loaded_or_the_request_fails(
    events: list[tuple[str, int, int]],
) -> None:
    """Daemons that go, blocks that vanish, deposits that fail, and claims that are cut."""
    around = Around()
    request = around.engine.ask(**PREPENDED)
    for event, num_local, share in events:
        if event != "lookup":
            around.happen(event)
        elif around.lookup(request, num_local, share):
            # It was preempted; the pool may have lost its blocks since.
            request.num_computed_tokens = 0
    around.engine.finish(request)

    assert not around.engine.serving._uses
    assert not around.engine.fake.leases
