"""What does the router cost for each request and each event, and what does it add to their time?

Beside vllm-router (Rust) with the same engines, canned ones that cost next to nothing, and beside
a relay that does not look at what it relays: the floor. Subjects take turns in every round.
"""

import argparse
import contextlib
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.figures import Figure, Target, emit
from benchmarks.quiet import BUSY_SHARE_MAX, foreign_share, read_cpu
from benchmarks.ratios import IntervalFigure, Rounds, flatten, ratio_interval
from benchmarks.router.load import Shape
from benchmarks.router.subjects import (
    PEER,
    RAW,
    Subject,
    kvkeep,
    measure,
    raw_relay,
    upstreams,
    vllm_router,
)

OK = 0
POLICIES = ("round_robin", "consistent_hash")
COST_RATIO_MAX = 0.5
ADDED_P99_MS_MAX = 1.0
CONNECTIONS = 16
SECONDS = 2.0
NUM_EVENTS, PAUSE_MS = 200, 4


@dataclass
class Taken:
    """Repetitions of one subject, one a round."""

    request_us: list[float] = field(default_factory=list)
    event_us: list[float] = field(default_factory=list)
    request_kernel_us: list[float] = field(default_factory=list)
    """Of these, in the kernel: what sockets cost, whoever reads them."""
    event_kernel_us: list[float] = field(default_factory=list)
    rate_per_s: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0 whether or not targets are met."""
    parser = argparse.ArgumentParser(prog="benchmarks.router", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="of every subject (default 5)")
    asked = parser.parse_args(argv)
    with upstreams(2) as urls:
        for policy in POLICIES:
            measure_policy(policy, urls, asked.rounds)
    return OK


def measure_policy(policy: str, urls: Sequence[str], num_rounds: int) -> None:
    """Emit the figures of one policy."""
    before = read_cpu()
    with contextlib.ExitStack() as stack:
        subjects = [stack.enter_context(make(urls, policy)) for make in (kvkeep, vllm_router)]
        if policy == "round_robin":
            subjects.append(stack.enter_context(raw_relay(urls, policy)))
        direct = Subject("direct", int(urls[0].rpartition(":")[2]), ())
        taken = {subject.name: Taken() for subject in [*subjects, direct]}
        for turn in range(num_rounds):
            for subject in _rotated(subjects, turn):
                take_costs(subject, taken[subject.name], policy)
            # Half of what the slowest relay can do, so that every subject gets the same load.
            rate_per_s = min(taken[subject.name].rate_per_s[-1] for subject in subjects) / 2
            for subject in _rotated([*subjects, direct], turn):
                take_latency(subject, taken[subject.name], policy, rate_per_s)
    is_quiet = foreign_share(before, read_cpu()) <= BUSY_SHARE_MAX
    own, peer = taken["kvkeep"], taken[PEER]
    name = f"router.{policy}"
    emit_cost(f"{name}.cpu_per_request", own.request_us, peer.request_us, PEER, is_quiet)
    emit_cost(f"{name}.cpu_per_event", own.event_us, peer.event_us, PEER, is_quiet)
    emit_kernel(f"{name}.cpu_per_request", own.request_kernel_us, peer.request_kernel_us)
    emit_kernel(f"{name}.cpu_per_event", own.event_kernel_us, peer.event_kernel_us)
    if RAW in taken:
        floor = taken[RAW]
        emit_cost(f"{name}.cpu_per_request.floor", own.request_us, floor.request_us, RAW)
        emit_cost(f"{name}.cpu_per_event.floor", own.event_us, floor.event_us, RAW)
    emit_rates(name, own, peer)
    emit_added(name, "p99", own.p99_ms, peer.p99_ms, taken["direct"].p99_ms)
    emit_added(name, "p50", own.p50_ms, peer.p50_ms, taken["direct"].p50_ms)


def take_costs(subject: Subject, taken: Taken, policy: str) -> None:
    """Processor time for each request, back to back, and for each event of paced streams."""
    is_keyed = policy == "consistent_hash"
    shape = Shape(subject.port, CONNECTIONS, SECONDS, session_header=is_keyed)
    seen, used = measure(subject, shape)
    assert not seen.num_errors, f"{subject.name}: {seen}"
    taken.request_us.append(1e6 * used.seconds / seen.num_requests)
    taken.request_kernel_us.append(taken.request_us[-1] * used.kernel_share)
    taken.rate_per_s.append(seen.num_requests / seen.seconds)
    shape = Shape(
        subject.port, CONNECTIONS, SECONDS,
        num_events=NUM_EVENTS, pause_ms=PAUSE_MS, session_header=is_keyed,
    )  # fmt: skip
    seen, used = measure(subject, shape)
    assert not seen.num_errors, f"{subject.name}: {seen}"
    taken.event_us.append(1e6 * used.seconds / seen.num_events)
    taken.event_kernel_us.append(taken.event_us[-1] * used.kernel_share)


def take_latency(subject: Subject, taken: Taken, policy: str, rate_per_s: float) -> None:
    """Time of each request at random moments."""
    is_keyed = policy == "consistent_hash"
    shape = Shape(subject.port, CONNECTIONS, SECONDS, rate_per_s, session_header=is_keyed)
    seen, _ = measure(subject, shape)
    taken.p50_ms.append(seen.p50_ms)
    taken.p99_ms.append(seen.p99_ms)


def emit_cost(
    name: str, own: list[float], peer: list[float], peer_name: str, is_quiet: bool = True
) -> None:
    """Emit microseconds beside another's, with an interval of the ratio."""
    rounds: tuple[Rounds, Rounds] = [[value] for value in own], [[value] for value in peer]
    emit(
        IntervalFigure(
            figure=name,
            value=statistics.median(own),
            unit="us",
            peer=statistics.median(peer),
            peer_name=peer_name,
            target=Target("ratio", "<=", COST_RATIO_MAX) if peer_name == PEER else None,
            spread=(min(own), max(own)),
            samples=len(flatten(rounds[0])),
            interval=ratio_interval(*rounds),
            is_quiet=is_quiet,
        )
    )


def emit_kernel(name: str, own: list[float], peer: list[float]) -> None:
    """Emit how much of a cost is the kernel's; the rest is the router's own."""
    emit(
        Figure(
            f"{name}.in_kernel", statistics.median(own), "us",
            peer=statistics.median(peer), peer_name=PEER,
            spread=(min(own), max(own)), samples=len(own),
        )
    )  # fmt: skip


def emit_rates(name: str, own: Taken, peer: Taken) -> None:
    """Emit how many requests went through when all were sent back to back."""
    emit(
        Figure(
            f"{name}.requests_per_s", statistics.median(own.rate_per_s), "1/s",
            peer=statistics.median(peer.rate_per_s), peer_name=PEER,
            spread=(min(own.rate_per_s), max(own.rate_per_s)), samples=len(own.rate_per_s),
        )
    )  # fmt: skip


def emit_added(
    name: str, part: str, own: list[float], peer: list[float], direct: list[float]
) -> None:
    """Emit what is added to the time without a router, at half the saturating rate."""
    added = [value - base for value, base in zip(own, direct, strict=True)]
    peer_added = [value - base for value, base in zip(peer, direct, strict=True)]
    emit(
        Figure(
            f"{name}.added_{part}", statistics.median(added), "ms",
            peer=statistics.median(peer_added), peer_name=PEER,
            target=Target("value", "<=", ADDED_P99_MS_MAX) if part == "p99" else None,
            spread=(min(added), max(added)), samples=len(added),
        )
    )  # fmt: skip


def _rotated(subjects: list[Subject], turn: int) -> list[Subject]:
    turn %= len(subjects)
    return subjects[turn:] + subjects[:turn]


if __name__ == "__main__":
    sys.exit(main())
