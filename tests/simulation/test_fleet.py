"""A router over simulated engines: what it saves, whom it loads, and a day of coming and going."""

import dataclasses
import statistics
import sys
from collections.abc import Callable
from functools import cache

import pytest

from kvkeep.router.events.block_events import BlockEvent, BlockRemoved
from kvkeep.router.policies.base import Policy
from kvkeep.router.policies.consistent_hash import ConsistentHash
from kvkeep.router.policies.prefix_aware import PrefixAware
from kvkeep.router.policies.round_robin import RoundRobin
from kvkeep.router.policies.session_affinity import SessionAffinity
from kvkeep.router.prefix_index import PrefixIndex
from kvkeep.testing.fleet.engine import EngineSettings
from kvkeep.testing.fleet.simulation import FleetReport, FleetSettings, FleetSimulation
from kvkeep.testing.fleet.workload import ChatSettings, DocumentSettings

SERVE_S = 120.0
MIXES = {
    "chat": FleetSettings(serve_s=SERVE_S),
    "documents": FleetSettings(serve_s=SERVE_S, chat=None, documents=DocumentSettings()),
    "both": FleetSettings(serve_s=SERVE_S, documents=DocumentSettings(asks_s=3.0)),
}
RECOMPUTED_MAX = 0.6
SMALL = EngineSettings(num_blocks=512)
BUSY = ChatSettings(num_users=60, think_s=1.0)
DAY_S = 86_400.0
TABLES_BYTES_MAX = 1 << 20
"""2,000 blocks of 256 bytes, the points of four engines on the ring, and some room."""
EMPTY_BYTES_MAX = 80 << 10
"""Without engines: 200 sessions, or nothing."""
QUIET_CHAT = ChatSettings(
    num_users=4,
    system_tokens=128,
    turns=(2, 5),
    question_tokens=(20, 80),
    answer_tokens=(20, 80),
    think_s=100.0,
)


def exact(index: PrefixIndex) -> Policy:
    return PrefixAware(index, is_approximate=False)


POLICIES: dict[str, Callable[[PrefixIndex], Policy]] = {
    "events": exact,
    "approximate": PrefixAware,
    "round_robin": lambda _: RoundRobin(),
    "consistent_hash": lambda _: ConsistentHash(),
    "session_affinity": lambda _: SessionAffinity(),
}


@cache
def report_of(mix: str, policy: str, seed: int = 1) -> FleetReport:
    settings = dataclasses.replace(MIXES[mix], has_events=policy == "events")
    return FleetSimulation(seed, settings, POLICIES[policy]).run()


@pytest.mark.parametrize("policy", ["events", "approximate"])
@pytest.mark.parametrize("mix", MIXES)
def test_prefixes_are_computed_less_often(mix: str, policy: str) -> None:
    """Of the same load, engines compute at most 0.6 times what round robin makes them compute."""
    ours, theirs = report_of(mix, policy), report_of(mix, "round_robin")

    assert ours.computed_share <= RECOMPUTED_MAX * theirs.computed_share
    assert ours.ttft_quantile(50) <= theirs.ttft_quantile(50)
    assert ours.ttft_quantile(95) <= theirs.ttft_quantile(95)


@pytest.mark.parametrize("policy", ["events", "approximate"])
@pytest.mark.parametrize("mix", MIXES)
def test_no_engine_becomes_a_hot_spot(mix: str, policy: str) -> None:
    """No engine gets half more than its share of requests, nor of the work of prefill."""
    report = report_of(mix, policy)
    busy = report.busy_by_engine.values()

    assert len(busy) == 4
    assert report.unfairness <= 1.5
    assert max(busy) <= 1.5 * sum(busy) / 4


@pytest.mark.parametrize("mix", MIXES)
def test_the_index_knows_what_engines_hold(mix: str) -> None:
    """With events, the belief about the chosen engine is off by at most a block at p95."""
    report = report_of(mix, "events")

    assert len(report.index_errors) == report.num_requests
    assert report.index_error_quantile(95) <= 1


class DeafToRemovals(FleetSimulation):
    """A router to which no removal of a block gets through."""

    def _told(self, name: str, engine: object, event: BlockEvent) -> None:
        if not isinstance(event, BlockRemoved):
            self.index.apply(name, event)


def test_an_index_that_misses_removals_is_found_out() -> None:
    """With small caches, the measure of the index's error sees that events are lost."""
    settings = FleetSettings(serve_s=SERVE_S, engine=SMALL)
    right = FleetSimulation(1, settings, exact).run()
    wrong = DeafToRemovals(1, settings, exact).run()

    assert right.index_error_quantile(95) <= 1
    assert wrong.index_error_quantile(95) > 1


def test_one_hot_document_gets_several_holders() -> None:
    """A document that everybody asks for at once is computed where there is room, too."""
    reading = DocumentSettings(num_documents=1, asks_s=40.0)
    settings = FleetSettings(serve_s=20.0, chat=None, documents=reading)
    report = FleetSimulation(1, settings, exact).run()

    assert len(report.requests_by_engine) == 4
    assert report.unfairness <= 1.5
    assert report.computed_share < 0.1


@pytest.mark.parametrize("policy", POLICIES)
def test_a_seed_can_be_run_again(policy: str) -> None:
    """The same seed gives the same run, whatever happened in this process before."""
    settings = FleetSettings(serve_s=60.0, churn_s=10.0, has_events=policy == "events")
    runs = [FleetSimulation(5, settings, POLICIES[policy]).run() for _ in range(2)]

    assert runs[0] == runs[1]
    assert runs[0].num_changes > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_requests_survive_engines_that_come_and_go(policy: str) -> None:
    """Under constant deaths every request is answered in the end, and counters return to 0."""
    settings = FleetSettings(
        serve_s=60.0, chat=BUSY, churn_s=2.0, engine=SMALL, has_events=policy == "events"
    )
    report = FleetSimulation(2, settings, POLICIES[policy]).run()

    assert report.num_changes > 10
    assert report.num_failed > 0
    assert report.num_answered == report.num_asked > 300
    assert report.num_requests == report.num_asked + report.num_failed


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["events", "approximate", "session_affinity"])
def test_a_day_of_coming_and_going_leaves_memory_flat(policy: str) -> None:
    """In 24 simulated hours of churn, what a router keeps does not grow after the first ones."""
    settings = FleetSettings(
        chat=QUIET_CHAT,
        engine=SMALL,
        serve_s=DAY_S,
        churn_s=600.0,
        # A fleet of one size, for what is kept depends on it.
        num_engines_range=(4, 4),
        has_events=policy == "events",
        index_blocks_max=2000,
    )
    policies = {**POLICIES, "session_affinity": lambda _: SessionAffinity(sessions_max=200)}
    simulation = FleetSimulation(3, settings, policies[policy])
    weights = []
    for part in range(1, 121):
        simulation.serve_until(part * 720.0)
        weights.append(footprint((simulation.policy, simulation.index)))
    simulation.drain()

    assert simulation.report.num_changes > 100
    assert simulation.report.num_requests > 2000
    # How much the engines hold differs by the hour, by up to a third.
    assert statistics.median(weights[60:]) <= 1.5 * statistics.median(weights[10:60])
    assert max(weights) <= TABLES_BYTES_MAX
    for name in list(simulation.engines):
        simulation.remove_engine(name)
    assert footprint((simulation.policy, simulation.index)) <= EMPTY_BYTES_MAX


def footprint(root: object) -> int:
    """Bytes of everything that can be reached from an object through tables and fields."""
    seen: set[int] = set()
    waiting: list[object] = [root]
    total = 0
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        total += sys.getsizeof(item)
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            waiting += item
        else:
            names = [*getattr(item, "__slots__", ()), *getattr(item, "__dict__", ())]
            waiting += [getattr(item, name, None) for name in names]
    return total
