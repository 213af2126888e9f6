"""What do routing policies save, whom do they load, and what does a choice cost?

Four simulated engines in virtual time under two mixes, of conversations and of questions about
shared documents: prompt tokens computed beside round robin's for the same seeds, fairness, the
index's error and size. Then the microseconds of one choice, in turns, on this machine.
"""

import argparse
import dataclasses
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from random import Random

from benchmarks.figures import Figure, Target, emit, median_figure
from kvkeep.model.announced import POOL_MEDIUM
from kvkeep.router.events.block_events import BlockStored, Hash
from kvkeep.router.policies.base import Policy
from kvkeep.router.policies.consistent_hash import ConsistentHash
from kvkeep.router.policies.least_loaded import LeastLoaded
from kvkeep.router.policies.power_of_two import PowerOfTwo
from kvkeep.router.policies.prefix_aware import PrefixAware
from kvkeep.router.policies.round_robin import RoundRobin
from kvkeep.router.policies.session_affinity import SessionAffinity
from kvkeep.router.prefix_hashes import text_hashes, token_hashes, token_root
from kvkeep.router.prefix_index import PrefixIndex
from kvkeep.router.request import RequestView
from kvkeep.router.snapshot import Endpoint
from kvkeep.testing.fleet.simulation import FleetReport, FleetSettings, FleetSimulation
from kvkeep.testing.fleet.workload import DocumentSettings

OK = 0
COMPUTED_MAX = 0.6
UNFAIR_MAX = 1.5
ERROR_BLOCKS_MAX = 1.0
MIXES = {
    "chat": FleetSettings(),
    "documents": FleetSettings(chat=None, documents=DocumentSettings()),
    "both": FleetSettings(documents=DocumentSettings(asks_s=3.0)),
}
EXACT, APPROXIMATE = "prefix_aware.events", "prefix_aware.approximate"
POLICIES: dict[str, Callable[[PrefixIndex], Policy]] = {
    "round_robin": lambda _: RoundRobin(),
    "least_loaded": lambda _: LeastLoaded(),
    "power_of_two": lambda _: PowerOfTwo(Random(1)),
    "consistent_hash": lambda _: ConsistentHash(),
    "session_affinity": lambda _: SessionAffinity(),
    APPROXIMATE: PrefixAware,
    EXACT: lambda index: PrefixAware(index, is_approximate=False),
}
PROMPT_TOKENS = 2048
BLOCK_TOKENS = 32
NUM_ENDPOINTS = 8
CALLS = 300


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0 whether or not targets are met."""
    parser = argparse.ArgumentParser(prog="benchmarks.routing", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default=3, type=int, help="runs of each policy and mix")
    parser.add_argument("--seconds", default=300.0, type=float, help="virtual time of each run")
    parser.add_argument("--rounds", default=9, type=int, help="of timing choices")
    options = parser.parse_args(argv)
    for mix, settings in MIXES.items():
        simulate(mix, dataclasses.replace(settings, serve_s=options.seconds), options.seeds)
    measure_choices(options.rounds)
    return OK


# --- In virtual time -----------------------------------------------------------------------------


def simulate(mix: str, settings: FleetSettings, num_seeds: int) -> None:
    """Run every policy over the same seeds, and print what came of it."""
    theirs: list[float] = []
    for name, make in POLICIES.items():
        shape = dataclasses.replace(settings, has_events=name == EXACT)
        reports = [FleetSimulation(seed, shape, make).run() for seed in range(num_seeds)]
        shares = [report.computed_share for report in reports]
        theirs = theirs or shares
        is_ours = name in (EXACT, APPROXIMATE)
        emit(
            median_figure(
                f"routing.{mix}.{name}.computed",
                shares,
                "of all prompt tokens",
                peer_values=theirs,
                peer_name="round_robin",
                target=Target("ratio", "<=", COMPUTED_MAX) if is_ours else None,
            )
        )
        print_run(f"routing.{mix}.{name}", reports, is_ours=is_ours)


def print_run(name: str, reports: Sequence[FleetReport], *, is_ours: bool) -> None:
    """Print fairness, waiting, and the index's error."""
    fair = Target("value", "<=", UNFAIR_MAX) if is_ours else None
    unfair = [report.unfairness for report in reports]
    emit(median_figure(f"{name}.requests_max_over_mean", unfair, "x", target=fair))
    for percent in (50, 95):
        waits = [1000 * report.ttft_quantile(percent) for report in reports]
        emit(median_figure(f"{name}.ttft_p{percent}", waits, "ms, virtual"))
    if reports[0].index_errors:
        errors = [report.index_error_quantile(95) for report in reports]
        bound = Target("value", "<=", ERROR_BLOCKS_MAX)
        emit(median_figure(f"{name}.index_error_p95", errors, "blocks", target=bound))


# --- On this machine -----------------------------------------------------------------------------


def measure_choices(num_rounds: int) -> None:
    """Time one choice of each policy among ``NUM_ENDPOINTS``, in turns."""
    chance = Random(1)
    fleet = tuple(
        Endpoint(name=f"http://10.0.0.{idx}:8000", host="h", port=1) for idx in range(NUM_ENDPOINTS)
    )
    prompts = [[chance.randrange(50_000) for _ in range(PROMPT_TOKENS)] for _ in range(16)]
    views = [
        RequestView(
            "/v1/completions",
            key=b"user-%d" % number,
            prefix=token_hashes(prompt, BLOCK_TOKENS, token_root()),
            num_tokens=PROMPT_TOKENS,
        )
        for number, prompt in enumerate(prompts)
    ]
    policies = {name: make(PrefixIndex(BLOCK_TOKENS)) for name, make in POLICIES.items()}
    del policies[APPROXIMATE]
    for policy in policies.values():
        for endpoint in fleet:
            policy.joined(endpoint)
        if isinstance(policy, PrefixAware):
            for view, endpoint in zip(views, fleet * 2, strict=True):
                policy.index.assume(endpoint.name, view.prefix or ())
    spent: dict[str, list[float]] = {name: [] for name in [*policies, "text", "tokens"]}
    text = b"All the world's a stage. " * (PROMPT_TOKENS * 4 // 25)
    for _ in range(num_rounds):
        for name, policy in policies.items():
            spent[name].append(_time(functools.partial(_choose, policy, views, fleet)))
        spent["text"].append(_time(lambda _: text_hashes(text)))
        spent["tokens"].append(
            _time(lambda n: token_hashes(prompts[n % 16], BLOCK_TOKENS, token_root()))
        )
    for name, values in spent.items():
        kind = "hashing" if name in ("text", "tokens") else "choice"
        emit(median_figure(f"routing.{kind}.{name}", values, "us"))
    emit(_size_figure("bytes_per_block_and_engine", _assumed))
    emit(_size_figure("bytes_per_block_and_engine.events", _stored))
    emit(_size_figure("bytes_per_block_and_daemon", _pooled))


def _choose(
    policy: Policy, views: Sequence[RequestView], fleet: Sequence[Endpoint], number: int
) -> None:
    policy.choose(views[number % len(views)], fleet, 0.0)


def _time(call: Callable[[int], object]) -> float:
    """Return microseconds of processor time per call."""
    gc.collect()
    begun = time.process_time()
    for number in range(CALLS):
        call(number)
    return 1e6 * (time.process_time() - begun) / CALLS


def _size_figure(name: str, tell: Callable[[PrefixIndex, int, Random], int]) -> Figure:
    """Return the bytes that a block known of an engine takes, of a full index.

    Args:
        name: Of the figure.
        tell: Brings news of 8 blocks of one engine, and returns how many are known of all.
    """
    import tracemalloc

    chance = Random(1)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    index = PrefixIndex(BLOCK_TOKENS, 5 << 10)
    sizes = []
    for number in range(4000):
        num_known = tell(index, number, chance)
        if number > 1500 and number % 100 == 0:
            used, _ = tracemalloc.get_traced_memory()
            sizes.append((used - before) / num_known)
    tracemalloc.stop()
    return Figure(
        figure=f"routing.index.{name}",
        value=statistics.median(sizes),
        unit="bytes",
        target=Target("value", "<=", 256),
        spread=(min(sizes), max(sizes)),
        samples=len(sizes),
    )


def _assumed(index: PrefixIndex, number: int, chance: Random) -> int:
    index.assume(f"engine-{number % 4}", [chance.getrandbits(60) for _ in range(8)])
    return sum(index.num_blocks(f"engine-{idx}") for idx in range(4))


def _stored(index: PrefixIndex, number: int, chance: Random) -> int:
    index.apply(f"engine-{number % 4}", _event(chance, [chance.getrandbits(64) for _ in range(8)]))
    return sum(index.num_blocks(f"engine-{idx}") for idx in range(4))


def _pooled(index: PrefixIndex, number: int, chance: Random) -> int:
    numbers = [chance.getrandbits(64) for _ in range(8)]
    # Events of an engine and of its daemon are read from bytes: equal numbers are not one object.
    copied: list[Hash] = [int(str(each)) for each in numbers]
    index.pools.apply("pool", BlockStored(copied, [], 1, medium=POOL_MEDIUM))
    index.apply("engine-0", _event(chance, numbers, POOL_MEDIUM))
    return index.pools.num_blocks("pool")


def _event(chance: Random, numbers: list[int], medium: str = "GPU") -> BlockStored:
    tokens = [chance.getrandbits(16) for _ in range(8 * BLOCK_TOKENS)]
    return BlockStored([*numbers], tokens, BLOCK_TOKENS, medium=medium)


if __name__ == "__main__":
    sys.exit(main())
