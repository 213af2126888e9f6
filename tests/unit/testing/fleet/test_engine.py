"""The simulated engine is worth believing: queue, cache, leases of hand-offs, death."""

from collections.abc import Sequence

import pytest

from kvkeep.router.events.block_events import BlockEvent, BlockRemoved, BlockStored
from kvkeep.testing.fleet.engine import EngineSettings, SimulatedEngine, SimulatedRequest
from kvkeep.testing.virtual_time import VirtualTime

SETTINGS = EngineSettings(
    prefill_tokens_s=1000.0,
    step_s=0.0,
    inter_token_s=0.1,
    crowding=0.0,
    num_blocks=8,
    block_tokens=10,
    running_max=2,
    event_delay_s=0.0,
)


class Bench:
    """An engine, what it told, and when its requests began and ended."""

    def __init__(self) -> None:
        self.time = VirtualTime()
        self.told: list[BlockEvent] = []
        self.engine = SimulatedEngine(self.time, 1, SETTINGS, self.told.append)
        self.began: list[tuple[str, float]] = []
        self.ended: list[tuple[str, float]] = []

    def ask(
        self, name: str, token_ids: Sequence[int], num_answer: int = 1, hold_s: float = 0.0
    ) -> SimulatedRequest:
        request = SimulatedRequest(
            token_ids,
            [7] * num_answer,
            lambda _: self.began.append((name, round(self.time.now_s(), 6))),
            lambda _: self.ended.append((name, round(self.time.now_s(), 6))),
            hold_s,
        )
        self.engine.submit(request)
        return request


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_prompts_wait_for_each_other(bench: Bench) -> None:
    """One prompt is computed after another, while others decode."""
    bench.ask("a", range(20), num_answer=5)
    bench.ask("b", range(100, 120))
    bench.time.run_until(10.0)

    assert bench.began == [("a", 0.02), ("b", 0.04)]
    assert bench.ended == [("b", 0.14), ("a", 0.52)]
    bench.engine.check_idle()


def test_a_known_prefix_is_not_computed(bench: Bench) -> None:
    """The second prompt is found but for the block of its last token, and the first answer too."""
    bench.ask("a", range(25), num_answer=6)
    bench.time.run_until(10.0)
    again = bench.ask("b", range(20))
    longer = bench.ask("c", [*range(25), *[7] * 6, *range(50, 55)])
    bench.time.run_until(20.0)

    assert (again.cached_tokens, longer.cached_tokens) == (10, 30)
    assert bench.engine.num_computed == 25 + 10 + 6


def test_events_tell_what_is_there(bench: Bench) -> None:
    """Stored with what they follow; removed when room is needed, ends of old sequences first."""
    bench.ask("a", range(30))
    bench.time.run_until(1.0)
    bench.ask("b", [*range(20), *range(60, 70)])
    bench.time.run_until(2.0)
    stored = [event for event in bench.told if isinstance(event, BlockStored)]
    bench.ask("c", range(200, 250))
    bench.time.run_until(3.0)
    removed = [event for event in bench.told if isinstance(event, BlockRemoved)]

    assert stored[1].parent_block_hash == stored[0].block_hashes[1]
    assert stored[1].token_ids == list(range(60, 70))
    assert [event.block_hashes for event in removed] == [[stored[0].block_hashes[2]]]


def test_a_prompt_that_never_fits_is_refused(bench: Bench) -> None:
    """It ends as failed, and those behind it are served."""
    large = bench.ask("large", range(1000))
    bench.ask("small", range(10))
    bench.time.run_until(1.0)

    assert large.is_failed
    assert [name for name, _ in bench.ended] == ["large", "small"]


def test_held_blocks_stay_until_claimed(bench: Bench) -> None:
    """A prefill for another engine keeps its blocks past its answer, and gives them up once."""
    held = bench.ask("a", range(80), hold_s=30.0)
    bench.time.run_until(1.0)
    bench.ask("b", range(100, 140))
    bench.time.run_until(2.0)
    waiting = bench.engine.num_waiting

    assert [name for name, _ in bench.ended] == ["a"]
    assert waiting == 1
    assert bench.engine.claim(held)
    assert not bench.engine.claim(held)
    bench.time.run_until(3.0)
    assert [name for name, _ in bench.ended] == ["a", "b"]
    bench.time.run_until(60.0)
    bench.engine.check_idle()


def test_a_lease_that_nobody_claims_ends(bench: Bench) -> None:
    """Blocks that were never fetched are free again after the lease, and can't be claimed."""
    held = bench.ask("a", range(80), hold_s=30.0)
    bench.ask("b", range(100, 140))
    bench.time.run_until(60.0)

    assert not bench.engine.claim(held)
    assert [name for name, _ in bench.ended] == ["a", "b"]
    bench.engine.check_idle()


@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.1])
def test_an_aborted_request_gives_everything_back(bench: Bench, after_s: float) -> None:
    """Waiting, computed or decoding: nothing more is told of it, and the others go on."""
    requests = {name: bench.ask(name, range(80), num_answer=100) for name in "ab"}
    bench.time.run_until(after_s)
    bench.engine.abort(requests["a"])
    bench.engine.abort(requests["a"])
    bench.time.run_until(60.0)

    assert [name for name, _ in bench.ended] == ["b"]
    bench.engine.check_idle()


def test_death_ends_everything_once(bench: Bench) -> None:
    """Whatever was waiting, computed or decoded ends as failed, nothing ends later."""
    requests = [bench.ask(name, range(10), num_answer=100) for name in "abcd"]
    bench.time.run_until(0.025)
    bench.engine.kill()
    bench.time.run_until(60.0)

    assert all(request.is_failed for request in requests)
    assert sorted(name for name, _ in bench.ended) == ["a", "b", "c", "d"]
    assert bench.ask("e", range(10)).is_failed
