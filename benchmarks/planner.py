"""Is a hit ever slower than a miss? Pairs of requests, with kvkeep and without, by length and tier.

Two engines, one without a connector, never busy at the same moment. For each point
(where the blocks lie, prompt length, requests at once) both answer the same prompts in turns, in
random order: one from kvkeep, after its own cache was reset and, for a lower tier, the pool was
cleared; the other by computing. The figure is the median of the paired ratios of times to the last
first token, with its interval. Then both answer prompts that nobody sends twice.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Figure, Target, emit
from benchmarks.peers.engines import (
    BLOCK_TOKENS,
    Answer,
    Engine,
    EngineSpec,
    engine,
    free_port,
    process,
    wait_until,
)
from benchmarks.quiet import BUSY_SHARE_MAX, foreign_share, read_cpu
from benchmarks.ratios import IntervalFigure, paired_figure
from kvkeep.stack.models import resolve_model
from kvkeep.validate.prompts import load_play

OK = 0
PLAY = "king_lear"
SLOWER_MAX = 1.02
THROUGHPUT_MIN = 0.99
CORES = "1"
"""Of both engines' computing threads: an engine's own process spins on the other while it waits."""
SPIN_S = 1.1
"""Idle that long, an engine spins no more: vLLM's processes look for work without rest for a second
(SpinCondition in its shm_broadcast), and a request of the other engine then takes a second too."""
LAST_OF_8_MAX = 1.3


@dataclass(frozen=True)
class Point:
    """One row of the table."""

    place: str
    num_tokens: int
    num_at_once: int

    @property
    def name(self) -> str:
        """The figure's."""
        return f"planner.{self.place}.tokens_{self.num_tokens}.at_once_{self.num_at_once}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0 whether or not targets are met."""
    parser = argparse.ArgumentParser(prog="benchmarks.planner", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", default=12, type=int, help="per point, at least 10")
    parser.add_argument("--tokens", default="48,96,256,1024")
    parser.add_argument("--at-once", default="1,4")
    parser.add_argument("--places", default="pool,disk")
    parser.add_argument("--distinct", default=200, type=int, help="prompts sent once")
    parser.add_argument("--logs", type=Path, help="folder to keep logs in")
    options = parser.parse_args(argv)
    points = [
        Point(place, int(tokens), int(at_once))
        for place in options.places.split(",")
        for tokens in options.tokens.split(",")
        for at_once in options.at_once.split(",")
    ]
    with tempfile.TemporaryDirectory(prefix="kvkeep-planner-") as scratch:
        folder = options.logs or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        with stage(folder) as bench:
            for point in points:
                emit(bench.measure(point, options.pairs))
            for figure in bench.measure_same(options.pairs):
                emit(figure)
            emit(bench.measure_distinct(options.distinct))
    return OK


@contextmanager
def stage(folder: Path) -> Iterator["Bench"]:
    """Start a daemon with a disk, an engine that uses it and one that does not."""
    model = Path(resolve_model("smollm2").location)
    sock, port = folder / "kvkeep.sock", free_port()
    pool = Path(f"/dev/shm/kvkeep-bench-{port}.pool")
    config = folder / "daemon.yaml"
    tier = {"kind": "disk", "folder": str(folder / "disk"), "capacity_bytes": 4 << 30}
    settings = {"socket": str(sock), "pool": str(pool), "pool_bytes": 1 << 30,
                "metrics_port": port, "tiers": [tier]}  # fmt: skip
    config.write_text(json.dumps(settings))
    transfer = {
        "kv_connector": "KvkeepConnector",
        "kv_connector_module_path": "kvkeep.connector.plugin",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"socket": str(sock)},
    }
    own = Path(sys.executable)
    command = [sys.executable, "-m", "kvkeep", "daemon", "--config", str(config)]
    with ExitStack() as stack:
        stack.callback(pool.unlink, missing_ok=True)
        child = stack.enter_context(process(command, EngineSpec(own, model).environment(),
                                            folder / "daemon.log"))  # fmt: skip
        status = Engine(port)
        wait_until(lambda: status.call("GET", "/health")[0] == 200, child, "the daemon")
        subject = EngineSpec(own, model, CORES, kv_transfer_config=transfer)
        with (
            engine(subject, folder / "subject.log") as with_kvkeep,
            engine(EngineSpec(own, model, CORES), folder / "plain.log") as without,
        ):
            yield Bench(with_kvkeep, without, sock, port)


class Bench:
    """Two engines and the daemon of one of them."""

    def __init__(self, subject: Engine, plain: Engine, socket: Path, port: int) -> None:
        self._subject = subject
        self._plain = plain
        self._socket = socket
        self._port = port
        self._chance = random.Random(1)
        self._text = load_play(PLAY)
        self._offset = 0
        self._threads = ThreadPoolExecutor(16)
        self._used_s: dict[int, float] = {}

    # ---- prompts

    def _prompts(self, num_tokens: int, count: int) -> list[str]:
        """Prompts that share no beginning with each other or with earlier ones."""
        found = []
        for _ in range(count):
            self._offset += 997
            start = self._offset % (len(self._text) - 8 * num_tokens)
            part = f"{self._offset} {self._text[start : start + 8 * num_tokens]}"
            found.append(self._subject.prompt_of(part, num_tokens))
        return found

    # ---- one answer

    def _ask(self, engine_: Engine, prompts: Sequence[str]) -> tuple[float, list[Answer]]:
        """Seconds until the last of these prompts has its first token, and the answers."""

        def one(prompt: str) -> Answer:
            return engine_.complete(prompt, max_tokens=1)

        self._wake(engine_)
        begun_s = time.perf_counter()
        answers = list(self._threads.map(one, prompts))
        self._used_s[engine_.port] = time.perf_counter()
        return self._used_s[engine_.port] - begun_s, answers

    def _wake(self, engine_: Engine) -> None:
        """Let the other engine come to rest, and this one not be asleep."""
        others = (used_s for port, used_s in self._used_s.items() if port != engine_.port)
        time.sleep(max(0.0, max(others, default=0.0) + SPIN_S - time.perf_counter()))
        engine_.complete("Well", max_tokens=1)

    def _status(self) -> dict[str, dict[str, int]]:
        url = f"http://127.0.0.1:{self._port}/status"
        with urllib.request.urlopen(url, timeout=10) as answer:
            found: dict[str, dict[str, int]] = json.load(answer)
            return found

    def _settle(self) -> None:
        """Wait until what was computed is stored and cascaded."""
        self._subject.reset_prefix_cache()  # true only when no store is in flight
        deadline_s = time.perf_counter() + 20
        while time.perf_counter() < deadline_s:
            movement = self._status()["movement"]
            tiers = movement["tiers"]
            assert isinstance(tiers, list)
            if not movement["cascades_waiting"] and not any(t["queued_bytes"] for t in tiers):
                return
            time.sleep(0.05)

    def _clear_pool(self) -> None:
        command = [sys.executable, "-m", "kvkeep", "cache", "clear", "--tier", "pool"]
        command += ["--socket", str(self._socket)]
        subprocess.run(command, check=True, capture_output=True)

    # ---- figures

    def measure(self, point: Point, num_pairs: int) -> IntervalFigure:
        """Pairs at one point."""
        prompts = self._prompts(point.num_tokens, point.num_at_once)
        self._ask(self._subject, prompts)
        self._settle()

        def kept() -> float:
            self._subject.reset_prefix_cache()
            if point.place != "pool":
                self._clear_pool()
            return self._ask(self._subject, prompts)[0]

        def computed() -> float:
            self._plain.reset_prefix_cache()
            if point.place != "pool":
                self._clear_pool()  # the same pause for both: what idles is slow to wake
            return self._ask(self._plain, prompts)[0]

        for warm in (kept, computed):
            warm()
        return self._paired(point.name, kept, computed, num_pairs,
                            Target("ratio", "<=", SLOWER_MAX))  # fmt: skip

    def measure_same(self, num_pairs: int) -> list[Figure]:
        """Eight requests for one prompt on the disk, against one request for it.

        What eight cost the engine by itself, where nothing has to come from anywhere, is beside it.
        """
        prompts = self._prompts(3000, 1)
        _, (answer,) = self._ask(self._subject, prompts)
        self._settle()

        def first_tokens(count: int) -> float:
            self._subject.reset_prefix_cache()
            self._clear_pool()
            return self._ask(self._subject, prompts * count)[0]

        first_tokens(1)
        before = self._promoted()
        first_tokens(8)
        promoted = self._promoted() - before
        num_blocks = answer.prompt_tokens // BLOCK_TOKENS
        transfers = Figure(
            "planner.same_prompt.transfers", promoted / num_blocks, "transfers of one prompt",
            target=Target("value", "<=", 1.0),
        )  # fmt: skip
        last = self._paired(
            "planner.same_prompt.last_of_8", lambda: first_tokens(8), lambda: first_tokens(1),
            num_pairs, Target("ratio", "<=", LAST_OF_8_MAX),
        )  # fmt: skip

        def on_engine(count: int) -> float:
            return self._ask(self._subject, prompts * count)[0]

        limit = self._paired(
            "planner.same_prompt.last_of_8_on_engine", lambda: on_engine(8), lambda: on_engine(1),
            num_pairs, None,
        )  # fmt: skip
        return [transfers, last, limit]

    def _promoted(self) -> int:
        return self._status()["counters"]["blocks_promoted"]

    def measure_distinct(self, count: int) -> IntervalFigure:
        """Prompts that nobody sends twice, four at once, in chunks that take turns."""
        chunk = 10
        before = self._status()["counters"]["blocks_cascaded"]

        def run(engine_: Engine) -> float:
            prompts = self._prompts(256, chunk)
            self._wake(engine_)
            begun_s = time.perf_counter()
            with ThreadPoolExecutor(4) as threads:
                list(threads.map(lambda p: engine_.complete(p, max_tokens=1), prompts))
            self._used_s[engine_.port] = time.perf_counter()
            return self._used_s[engine_.port] - begun_s

        run(self._subject)
        run(self._plain)
        figure = self._paired(
            "planner.distinct_prompts.time", lambda: run(self._subject), lambda: run(self._plain),
            count // chunk, Target("ratio", "<=", 1 / THROUGHPUT_MIN),
        )  # fmt: skip
        self._settle()
        written = self._status()["counters"]["blocks_cascaded"] - before
        print(f"# blocks written to the disk for {count} distinct prompts: {written}",
              file=sys.stderr)  # fmt: skip
        return figure

    def _paired(
        self,
        name: str,
        subject: Callable[[], float],
        plain: Callable[[], float],
        num_pairs: int,
        target: Target | None,
    ) -> IntervalFigure:
        pairs: list[tuple[float, float]] = []
        num_disturbed = 0
        while len(pairs) < num_pairs and num_disturbed < 3 * num_pairs:
            before = read_cpu()
            if self._chance.random() < 0.5:
                mine = subject()
                theirs = plain()
            else:
                theirs = plain()
                mine = subject()
            if foreign_share(before, read_cpu()) > BUSY_SHARE_MAX:
                num_disturbed += 1
                if num_disturbed % 3:
                    continue
            pairs.append((mine, theirs))
        return paired_figure(name, pairs, target, is_quiet=num_disturbed <= num_pairs // 2)


if __name__ == "__main__":
    sys.exit(main())
