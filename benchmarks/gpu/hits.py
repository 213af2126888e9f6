"""Is a hit ever slower than a miss on a GPU? As ``benchmarks.planner`` asks it on processors.

Two engines share one GPU and are never busy at the same moment: one with kvkeep, whose daemon has
a disk below its pool, one without a connector. Pairs in random order; each figure is the median of
the paired ratios with its interval. What is asked: prompts by length, number at once and place of
their KV; eight requests for one prompt against one; prompts that nobody sends twice.

    PYTHONPATH=/tmp/site:src python3 -m benchmarks.gpu.hits --config /tmp/site/qwen3-14b
"""

import argparse
import copy
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx

from benchmarks.figures import Figure, Target, emit
from benchmarks.gpu.answers import begin
from benchmarks.gpu.processes import (
    Daemon,
    Engine,
    add_arguments,
    kvkeep_connector,
    kvkeep_daemon,
    vllm_server,
    wait_for,
)
from benchmarks.gpu.random_model import make_model
from benchmarks.ratios import IntervalFigure, paired_figure

SLOWER_MAX = 1.02
LAST_OF_8_MAX = 1.3
THROUGHPUT_MIN = 0.99
SAME_TOKENS = 3000
DISTINCT_CHUNK = 20
WHAT = ("distinct", "same", "pool", "disk")
VOCABULARY = 40_000


class Bench:
    """Both engines and the daemon of one of them."""

    def __init__(self, subject: Engine, plain: Engine, daemon: Daemon, num_pairs: int) -> None:
        self._subject = subject
        self._plain = plain
        self._daemon = daemon
        self._num_pairs = num_pairs
        self._chance = random.Random(1)
        self._threads = ThreadPoolExecutor(16)

    def prompts(self, num_tokens: int, count: int) -> list[list[int]]:
        """Prompts of random tokens, new ones each time."""
        chance = self._chance
        return [
            [chance.randrange(100, VOCABULARY) for _ in range(num_tokens)] for _ in range(count)
        ]

    def ask(self, engine: Engine, prompts: Sequence[list[int]]) -> float:
        """Seconds until the last of these prompts has its only token."""

        def one(prompt: list[int]) -> None:
            body = {"model": "m", "prompt": prompt, "max_tokens": 1, "temperature": 0}
            engine.http.post("/v1/completions", json=body).raise_for_status()

        begun_s = time.perf_counter()
        list(self._threads.map(one, prompts))
        return time.perf_counter() - begun_s

    def settle(self) -> None:
        """Wait until what was computed is stored and cascaded."""
        self._subject.reset()  # refused while a store is in flight

        def is_still() -> bool:
            movement = self.status()["movement"]
            if movement is None:
                return True
            tiers = movement["tiers"]
            return not movement["cascades_waiting"] and not any(t["queued_bytes"] for t in tiers)

        wait_for("blocks on the disk", is_still, timeout_s=60, every_s=0.05)

    def status(self) -> dict[str, dict[str, list[dict[str, int]]] | None]:
        """What the daemon says of itself."""
        url = f"http://127.0.0.1:{self._daemon.port}/status"
        found: dict[str, dict[str, list[dict[str, int]]] | None] = httpx.get(
            url, timeout=10.0
        ).json()
        return found

    def clear_pool(self) -> None:
        """What is not on the disk is lost."""
        program = "from kvkeep.cli.main import main; main()"
        command = [sys.executable, "-c", program, "cache", "clear", "--tier", "pool"]
        subprocess.run([*command, "--socket", self._daemon.socket], check=True, capture_output=True)

    def paired(
        self,
        name: str,
        subject: Callable[[], float],
        plain: Callable[[], float],
        target: Target | None,
        num_pairs: int = 0,
    ) -> IntervalFigure:
        """Both in turns, in random order."""
        pairs = []
        for _ in range(num_pairs or self._num_pairs):
            if self._chance.random() < 0.5:
                mine = subject()
                theirs = plain()
            else:
                theirs = plain()
                mine = subject()
            pairs.append((mine, theirs))
        return paired_figure(f"gpu_hits.{name}", pairs, target, is_quiet=True)

    # ---- figures

    def point(self, place: str, num_tokens: int, num_at_once: int) -> IntervalFigure:
        """Stored prompts against computing them."""
        prompts = self.prompts(num_tokens, num_at_once)
        self.ask(self._subject, prompts)
        self.settle()

        def kept() -> float:
            self._subject.reset()
            if place == "disk":
                self.clear_pool()
            return self.ask(self._subject, prompts)

        def computed() -> float:
            self._plain.reset()
            if place == "disk":
                self.clear_pool()  # the same pause for both: what idles is slow to wake
            return self.ask(self._plain, prompts)

        for warm in (kept, computed):
            warm()
        name = f"{place}.tokens_{num_tokens}.at_once_{num_at_once}"
        return self.paired(name, kept, computed, Target("ratio", "<=", SLOWER_MAX))

    def same_prompt(self) -> list[Figure]:
        """Eight requests for one prompt against one, from the pool, the disk, and on the engine."""
        (prompt,) = self.prompts(SAME_TOKENS, 1)
        self.ask(self._subject, [prompt])
        self.settle()

        def from_outside(count: int, place: str) -> float:
            self._subject.reset()
            if place == "disk":
                self.clear_pool()
            return self.ask(self._subject, [prompt] * count)

        def on_engine(count: int) -> float:
            return self.ask(self._subject, [prompt] * count)

        found: list[Figure] = []
        for place in ("pool", "disk"):
            found.append(
                self.paired(
                    f"same_prompt.{place}.last_of_8",
                    lambda place=place: from_outside(8, place),  # type: ignore[misc]
                    lambda place=place: from_outside(1, place),  # type: ignore[misc]
                    Target("ratio", "<=", LAST_OF_8_MAX),
                )
            )
        on_engine(1)
        return [*found, self.paired("same_prompt.on_engine.last_of_8", lambda: on_engine(8),
                                    lambda: on_engine(1), None)]  # fmt: skip

    def distinct(self, count: int, num_tokens: int) -> IntervalFigure:
        """Prompts that nobody sends twice, four at once, in chunks that take turns."""

        def run(engine: Engine) -> float:
            prompts = self.prompts(num_tokens, DISTINCT_CHUNK)
            begun_s = time.perf_counter()
            for start in range(0, DISTINCT_CHUNK, 4):
                self.ask(engine, prompts[start : start + 4])
            return time.perf_counter() - begun_s

        for engine in (self._subject, self._plain):
            run(engine)
        return self.paired(
            "distinct_prompts.time", lambda: run(self._subject), lambda: run(self._plain),
            Target("ratio", "<=", 1 / THROUGHPUT_MIN), max(10, count // DISTINCT_CHUNK),
        )  # fmt: skip


def measure(bench: Bench, args: argparse.Namespace) -> None:
    """Print each figure when it is there: the run may be cut off."""
    if "distinct" in args.what:
        emit(bench.distinct(args.distinct, args.distinct_tokens))
    if "same" in args.what:
        for figure in bench.same_prompt():
            emit(figure)
    for place in ("pool", "disk"):
        for num_tokens in args.lengths if place in args.what else ():
            for num_at_once in (1, 4):
                emit(bench.point(place, num_tokens, num_at_once))
                sys.stdout.flush()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument(
        "--what", nargs="+", choices=WHAT, default=WHAT, help="some of the questions only"
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--distinct", type=int, default=400, help="prompts sent once, by each")
    parser.add_argument("--distinct-tokens", type=int, default=2000, help="of each of these")
    args = parser.parse_args()
    args.batch_invariant = False
    return args


def main() -> int:
    """Run and report; 0 whether or not targets are met."""
    args = parse_arguments()
    begin(args)
    if args.model is None:
        args.model = args.work / "model"
        make_model(args.config, args.model, num_layers=args.layers)
    tier = {"kind": "disk", "folder": str(args.work / "disk"), "capacity_bytes": 20 << 30}
    settings = args.work / "daemon.yaml"
    # Prompts that come once would be measured with the disk's own load.
    settings.write_text(json.dumps({"tiers": [tier] if {"same", "disk"} & {*args.what} else []}))
    other = copy.copy(args)
    other.port = args.port + 1
    with (
        kvkeep_daemon(args, "--config", str(settings)) as daemon,
        vllm_server(
            "subject", args, kvkeep_connector(daemon.socket, args.connector_settings)
        ) as subject,
        vllm_server("plain", other, None) as plain,
    ):
        measure(Bench(subject, plain, daemon, args.pairs), args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
