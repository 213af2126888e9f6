"""One round of the time-to-first-token benchmark, on an engine that is only imagined."""

from collections.abc import Callable, Mapping

import pytest

from benchmarks.peers.engines import Answer, Engine, EngineError
from benchmarks.peers.rounds import Neighbours, compare, complete_proven, run_round, settle
from benchmarks.quiet import CORES, CpuReading

TOKENS = (5, 6, 7)


def answer(*token_ids: int, top: tuple[Mapping[str, float], ...] = ()) -> Answer:
    return Answer(0.05, token_ids, cached_tokens=0, prompt_tokens=100, top_logprobs=top)


class ImaginedEngine(Engine):
    """Serves every prompt from where it is: nowhere, the store, or its own blocks."""

    def __init__(self, *, stores: bool = True, served_tokens: int = 96) -> None:
        super().__init__(port=0)
        self.stores = stores
        self.served_tokens = served_tokens
        self.seen: set[str] = set()
        self.local: set[str] = set()
        self.hits = {"local_hits": 0.0, "external_hits": 0.0}
        self.cached_answer = TOKENS

    def counters(self) -> dict[str, float]:
        return dict(self.hits)

    def reset_prefix_cache(self, timeout_s: float = 10.0) -> None:
        self.local.clear()

    def prompt_of(self, text: str, num_tokens: int) -> str:
        return text[:num_tokens]

    def complete(
        self,
        prompt: str,
        *,
        max_tokens: int = 4,
        logprobs: int | None = None,
        salt: str | None = None,
        begun: Callable[[], object] = lambda: None,
    ) -> Answer:
        if prompt in self.local:
            self.hits["local_hits"] += self.served_tokens
        elif prompt in self.seen and self.stores:
            self.hits["external_hits"] += self.served_tokens
        self.seen.add(prompt)
        self.local.add(prompt)
        return answer(*self.cached_answer)


class ImaginedNeighbours(Neighbours):
    """Take all processors during the first pairs, nothing later."""

    def __init__(self, busy_pairs: int = 0) -> None:
        self.readings = 0
        self.busy_pairs = busy_pairs
        self.pauses = 0

    def read(self) -> CpuReading:
        self.readings += 1
        busy_readings = min(self.readings, 2 * self.busy_pairs)
        return CpuReading(at_s=self.readings, busy_s=busy_readings * CORES, own_s=0.0)

    def pause(self) -> None:
        self.pauses += 1


TEXT = "".join(f"line {number} of a long text\n" for number in range(4000))


def test_a_load_is_proven_by_external_hits_alone() -> None:
    """A prompt served by the engine's own blocks is no load, whatever lies in the store."""
    engine = ImaginedEngine()
    engine.complete("p")

    assert not complete_proven(engine, "p").is_load

    engine.reset_prefix_cache()
    proven = complete_proven(engine, "p")

    assert proven.is_load
    assert proven.served_share == pytest.approx(0.96)


def test_a_round_counts_every_reset_and_its_proof() -> None:
    """Each repetition is one on-engine and one loaded request, both proven."""
    found = run_round(ImaginedEngine(), TEXT, 5, loads=True, neighbours=ImaginedNeighbours())

    assert found.num_resets == 5
    assert len(found.loaded_s) == len(found.on_engine_s) == 5
    assert found.served_shares == [pytest.approx(0.96)] * 5
    assert all(found.equal_answers)
    assert found.cold_verdict == "equal"


def test_disturbed_repetitions_are_taken_again() -> None:
    """Times taken while others worked are dropped; their proofs still count."""
    neighbours = ImaginedNeighbours(busy_pairs=3)

    found = run_round(ImaginedEngine(), TEXT, 5, loads=True, neighbours=neighbours)

    assert (found.num_disturbed, neighbours.pauses) == (3, 3)
    assert (found.num_resets, len(found.loaded_s)) == (8, 5)
    assert found.is_quiet


def test_where_quiet_never_comes_the_round_says_so() -> None:
    """Disturbed times are kept rather than none, and marked."""
    neighbours = ImaginedNeighbours(busy_pairs=1000)

    found = run_round(ImaginedEngine(), TEXT, 2, loads=True, neighbours=neighbours)

    assert not found.is_quiet
    assert len(found.loaded_s) == found.num_disturbed == 10


def test_a_round_without_connector_has_no_loads() -> None:
    """The plain engine is measured for what it computes and keeps."""
    found = run_round(
        ImaginedEngine(stores=False), TEXT, 4, loads=False, neighbours=ImaginedNeighbours()
    )

    assert (found.num_resets, found.loaded_s) == (0, [])
    assert len(found.on_engine_s) == 4


def test_a_store_that_never_loads_is_an_error() -> None:
    """A subject that does not work is said so, instead of timing recomputation as a load."""
    with pytest.raises(EngineError, match="nothing was loaded"):
        settle(ImaginedEngine(stores=False), "p", timeout_s=0.02)


def test_answers_that_differ_where_candidates_are_close_are_a_near_tie() -> None:
    """Either of two nearly equal candidates may win under another batch shape."""
    close = ({"a": -0.1, "b": -3.0}, {"a": -0.7, "b": -0.8})

    assert compare(answer(1, 2, top=close), answer(1, 3, top=close)) == "near tie at token 1"


def test_answers_that_differ_where_one_candidate_leads_are_different() -> None:
    """A clear lead lost is a wrong answer."""
    clear = ({"a": -0.1, "b": -3.0},)

    assert compare(answer(2, top=clear), answer(3, top=clear)) == "differs at token 0"


def test_answers_without_candidates_are_never_excused() -> None:
    """No evidence of a tie is no tie."""
    assert compare(answer(2), answer(3)) == "differs at token 0"
    assert compare(answer(2), answer(2)) == "equal"
    assert compare(answer(2), answer(2, 3)) == "differs in length"
