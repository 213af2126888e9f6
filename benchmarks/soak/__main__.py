"""The soak: `make soak`, half an hour, or `make soak MINUTES=3`.

A real daemon with a pool of a quarter of the working set, a disk and a Valkey server below it, and
simulated engines that come, store, load, forget and leave. Prints one JSON line per figure at the
end; samples go to a log as they are taken. It is no benchmark of `make bench`: it takes its time.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.figures import Figure, Target, emit
from benchmarks.soak.load import DOCUMENT_BLOCKS, LAYOUT, Engine, Ledger, count_served
from benchmarks.soak.samples import UNITS, Sampler, take_sample
from benchmarks.soak.trend import Trend, trend_of
from tests.integration.daemons import Daemon, running_daemon, wait_until
from tests.servers.valkey import ValkeyServer

POOL_BYTES = 64 << 20
WORKING_SET_BYTES = 4 * POOL_BYTES
DISK_BYTES = 2 * WORKING_SET_BYTES
"""Room for the working set while half of it is on probation, and for what comes once."""
VALKEY_BYTES = WORKING_SET_BYTES // 2
NUM_ENGINES = 3
SAMPLE_EVERY_S_MAX = 5.0
GROWTH_SHARE_MAX = 0.01
"""Flat: growth an hour that is surely above this share of the median does not pass."""
WATCHED = (
    *("resident_anonymous", "shared_memory", "pool_file", "files", "threads", "sessions"),
    *("read_leases", "write_leases"),
    *("slots_free", "slots_ready", "slots_writing", "slots_doomed", "slots_fenced"),
)
CONNECTIONS_MAX = 16
"""Held by the daemon to one server (``kvkeep.tiers.valkey.IDLE_MAX``)."""
CANARIES = NUM_ENGINES
"""An engine that left has one slot for its canary, fenced off until it greets again or its process
ends; all engines are threads of this process."""
LAST_LEASES_S = 15.0
"""Leases that nobody released have run out by then."""


def soak() -> int:
    """Run, print the figures; returns 0 if all are met, 1 if not."""
    parser = argparse.ArgumentParser(prog="make soak")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path, default=Path("results/soak.jsonl"))
    parsed = parser.parse_args()
    if not 0.5 <= parsed.minutes <= 10_000:
        print(f"--minutes {parsed.minutes:g}: choose 0.5 to 10000.", file=sys.stderr)
        return 2
    parsed.log.parent.mkdir(parents=True, exist_ok=True)
    print(f"soaking for {parsed.minutes:g} minutes, samples in {parsed.log}", file=sys.stderr)
    figures = run(60 * parsed.minutes, parsed.seed, parsed.log)
    for figure in figures:
        emit(figure)
    return 0 if all(figure.met is not False for figure in figures) else 1


def run(duration_s: float, seed: int, log: Path) -> list[Figure]:
    """Soak a daemon, then ask for everything again."""
    ledger = Ledger(WORKING_SET_BYTES // LAYOUT.block_bytes // DOCUMENT_BLOCKS)
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="kvkeep-soak-")))
        valkey = ValkeyServer("--maxmemory", str(VALKEY_BYTES), "--maxmemory-policy", "allkeys-lru")
        ends.callback(valkey.stop)
        valkey.run()
        config = folder / "daemon.yaml"
        config.write_text(json.dumps({"tiers": tiers(folder, valkey)}))
        daemon = ends.enter_context(
            running_daemon(config=config, pool_bytes=POOL_BYTES, planner="load")
        )
        lines = ends.enter_context(log.open("w"))
        every_s = min(SAMPLE_EVERY_S_MAX, duration_s / 100)
        with Sampler(daemon, valkey.port, every_s, lines) as sampler:
            load(daemon, ledger, seed, duration_s)
        figures = [growth(name, trend_of(sampler.series[name])) for name in WATCHED]
        figures.append(peak("server_connections", sampler.series, CONNECTIONS_MAX))
        left = take_left(daemon, valkey.port)
        return figures + final_figures(daemon, ledger, left, duration_s)


def tiers(folder: Path, valkey: ValkeyServer) -> list[dict[str, object]]:
    """A disk that holds the working set, and a server that holds half of it."""
    disk = {"kind": "disk", "folder": str(folder / "disk"), "capacity_bytes": DISK_BYTES}
    return [disk, {"kind": "valkey", "url": valkey.url, "capacity_bytes": VALKEY_BYTES}]


def load(daemon: Daemon, ledger: Ledger, seed: int, duration_s: float) -> None:
    """Let engines work until the time is over or one of them finds something wrong."""
    ended = threading.Event()
    engines = [Engine(daemon, ledger, seed * 1000 + n, ended) for n in range(NUM_ENGINES)]
    for engine in engines:
        engine.start()
    end_s = time.perf_counter() + duration_s
    while time.perf_counter() < end_s and all(engine.is_alive() for engine in engines):
        ended.wait(0.2)
    ended.set()
    for engine in engines:
        engine.join()
    for engine in engines:
        if engine.error is not None:
            raise engine.error


def growth(name: str, trend: Trend) -> Figure:
    """Growth that is sure: the lower end of the slope's interval, against a share of the median."""
    unit = f"{UNITS.get(name, '')}/h".lstrip()
    bound = max(GROWTH_SHARE_MAX * trend.median, 1e-9)
    return Figure(
        figure=f"soak.{name}.sure_growth",
        value=trend.low,
        unit=f"{unit} (slope {trend.slope:.4g}, median {trend.median:.4g})",
        target=Target("value", "<=", bound),
        spread=(trend.low, trend.high),
        samples=trend.num_samples,
    )


def peak(name: str, series: dict[str, list[tuple[float, float]]], most: float) -> Figure:
    """What goes up and down by chance, but not above what it is bounded by."""
    values = [value for _, value in series[name]]
    return Figure(
        figure=f"soak.{name}.peak",
        value=max(values),
        unit="",
        target=Target("value", "<=", most),
        spread=(min(values), max(values)),
        samples=len(values),
    )


def take_left(daemon: Daemon, server_port: int) -> dict[str, float]:
    """What is held when all have gone and what they forgot has run out."""
    wait_until(lambda: daemon.gauge("read_leases") == 0, "leases run out", LAST_LEASES_S)
    return take_sample(daemon, server_port)


def final_figures(
    daemon: Daemon, ledger: Ledger, left: dict[str, float], duration_s: float
) -> list[Figure]:
    """What is left when all have gone, what was wrong, and what is lost."""
    wrong_before = ledger.counts["wrong"]
    num_served = count_served(daemon, ledger)
    status = daemon.status()
    counters = status["counters"]
    num_missing = len(ledger.stored) - num_served
    num_counted = sum(
        counters[name] for name in ("cascades_too_late", "cascades_refused", "promotions_failed")
    )
    num_stuck = left["slots_writing"] + left["slots_doomed"] + left["slots_fenced"]
    none = Target("value", "<=", 0)
    return [
        Figure("soak.leases_left", left["read_leases"] + left["write_leases"], "", target=none),
        Figure("soak.slots_stuck", num_stuck, "slots", target=Target("value", "<=", CANARIES)),
        Figure("soak.wrong_blocks", max(wrong_before, ledger.counts["wrong"]), "", target=none),
        Figure("soak.unreadable_lent_blocks", ledger.counts["not_landed"], "", target=none),
        Figure("soak.blocks_after_their_lease", ledger.counts["outlived"], ""),
        Figure("soak.corrupt_blocks", counters["blocks_corrupt"], "blocks", target=none),
        Figure("soak.proven_blocks", ledger.counts["right"], "blocks"),
        Figure("soak.stored_blocks", len(ledger.stored), "different blocks of the working set"),
        Figure("soak.served_at_the_end", num_served, "blocks"),
        Figure("soak.evicted_uncopied_blocks", num_counted, "blocks, as counted"),
        Figure("soak.lost_blocks", max(0, num_missing - num_counted), "blocks", target=none),
        Figure("soak.requests_per_s", ledger.counts["requests"] / duration_s, "requests/s"),
        Figure("soak.promoted_blocks", counters["blocks_promoted"], "blocks"),
        Figure("soak.cascaded_blocks", counters["blocks_cascaded"], "blocks"),
        Figure("soak.evicted_blocks", counters["blocks_evicted"], "blocks"),
        Figure("soak.abandoned_leases", ledger.counts["abandoned"], "leases"),
    ]


if __name__ == "__main__":
    sys.exit(soak())
