"""Are the answers the same when a prompt's KV left the GPU and came back through kvkeep?

Starts a daemon and one vLLM engine on this host, asks the same prompts cold, from the engine's
own prefix cache, and loaded from the pool (before and after a restart of the engine), and
compares token ids and log probabilities. Counters of the engine prove where the KV came from.
The model has random weights of a trained model's magnitude, made here from a seed: with them an
answer depends on every key and value of the prompt, which one phase checks.

Prints one JSON object, writes it and all logs under ``--out``, and exits 0 only if all holds.

    PYTHONPATH=/tmp/site:src python3 -m benchmarks.gpu.answers --config /tmp/site/qwen3-14b
"""

import argparse
import json
import random
import signal
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import FrameType
from typing import Any

import httpx

from benchmarks.gpu.copy_limit import copy_limits
from benchmarks.gpu.processes import (
    Answer,
    Daemon,
    Engine,
    RunError,
    StartError,
    add_arguments,
    kvkeep_connector,
    kvkeep_daemon,
    vllm_server,
    wait_for,
)
from benchmarks.gpu.random_model import make_model

LOADED = ("loaded", "loaded_again", "loaded_together", "restarted")
COMPARED = {"cold": ("cold_again", "swapped", "stored", "local", *LOADED), "local": LOADED}
"""What is compared with what."""


@dataclass
class Phase:
    """All prompts once, and what the engine counted meanwhile."""

    answers: list[Answer]
    hits: dict[str, float]
    wall_s: float

    def summary(self, wanted_tokens: int) -> dict[str, Any]:
        """Counters, the share of whole blocks that came from outside, and times."""
        return {
            "local_tokens": int(self.hits["local"]),
            "external_tokens": int(self.hits["external"]),
            "external_share": round(self.hits["external"] / wanted_tokens, 4),
            "first_ms_median": round(1e3 * statistics.median(a.first_s for a in self.answers), 1),
            "wall_s": round(self.wall_s, 3),
        }


def run_phase(
    engine: Engine, prompts: list[list[int]], salts: list[str], *, together: bool = False
) -> Phase:
    """Ask every prompt, one after the other or all at once."""
    before, begun = engine.counters(), time.perf_counter()
    with ThreadPoolExecutor(len(prompts) if together else 1) as pool:
        answers = list(pool.map(engine.ask, prompts, salts))
    wall_s, asked = time.perf_counter() - begun, sum(map(len, prompts))
    wait_for(
        "counters of the phase",
        lambda: engine.counters()["queries"] - before["queries"] >= asked,
        timeout_s=10,
    )
    after = engine.counters()
    phase = Phase(answers, {name: after[name] - before[name] for name in after}, wall_s)
    print(json.dumps({"salt": salts[0], **phase.summary(asked)}), flush=True)
    return phase


def compare(left: Phase, right: Phase) -> dict[str, Any]:
    """How many answers agree, in tokens and bit for bit, and how far apart they are."""
    pairs = list(zip(left.answers, right.answers, strict=True))
    gaps = [
        abs(a - b)
        for one, other in pairs
        for a, b in zip(one.logprobs[:1], other.logprobs[:1], strict=True)
    ]
    return {
        "of": len(pairs),
        "tokens_equal": sum(a.tokens == b.tokens for a, b in pairs),
        "bit_equal": sum(
            a.tokens == b.tokens and a.logprobs == b.logprobs and a.top == b.top for a, b in pairs
        ),
        "first_logprob_diff_max": max(gaps),
    }


def make_prompts(count: int, lengths: tuple[int, int], vocabulary: int) -> list[list[int]]:
    """Fixed random prompts, lengths spread over the range and no multiple of a block."""
    rng, (low, high) = random.Random(1), lengths
    step = (high - low) / max(count - 1, 1)
    return [
        [rng.randrange(100, vocabulary) for _ in range(round(low + i * step) + i % 7)]
        for i in range(count)
    ]


def swapped(prompt: list[int], block_tokens: int) -> list[int]:
    """The prompt with its first two blocks exchanged: the same tokens at other positions."""
    return [
        *prompt[block_tokens : 2 * block_tokens],
        *prompt[:block_tokens],
        *prompt[2 * block_tokens :],
    ]


# --- the run ---------------------------------------------------------------------------------


def first_engine(
    engine: Engine, daemon: Daemon | None, prompts: list[list[int]], args: argparse.Namespace
) -> dict[str, Phase]:
    """Every phase that one engine can show."""
    count, same = len(prompts), ["s"] * len(prompts)
    run_phase(engine, prompts[:1] * 2, ["warm-1", "warm-2"])
    phases = {
        "cold": run_phase(engine, prompts, [f"a{i}" for i in range(count)]),
        "cold_again": run_phase(engine, prompts, [f"b{i}" for i in range(count)]),
        "stored": run_phase(engine, prompts, same),
        "local": run_phase(engine, prompts, same),
        "swapped": run_phase(engine, [swapped(p, args.block_tokens) for p in prompts], same),
    }
    for name, together in (("loaded", False), ("loaded_again", False), ("loaded_together", True)):
        if daemon is not None:
            daemon.wait_until_stored()
        engine.reset()
        phases[name] = run_phase(engine, prompts, same, together=together)
    return phases


def bandwidth(before: dict[str, int], after: dict[str, int]) -> dict[str, Any]:
    """GB/s of the workers' copies, from what they reported to the daemon."""
    moved = {name: after[name] - before.get(name, 0) for name in after}
    result: dict[str, Any] = {}
    for verb in ("store", "load"):
        past = {"store": "stored", "load": "loaded"}[verb]
        if moved.get(f"{verb}_us"):
            rate = moved[f"bytes_{past}"] / moved[f"{verb}_us"] / 1e3
            result[f"{verb}_gb_per_s"] = round(rate, 2)
        result[f"bytes_{past}"] = moved.get(f"bytes_{past}", 0)
    return result


def judge(
    phases: dict[str, Phase], comparisons: dict[str, dict[str, Any]], *, batch_invariant: bool
) -> list[str]:
    """Everything that is not as it must be; empty: the run passed."""
    found = []
    for name in ("loaded", "loaded_again", "restarted"):
        hits = phases[name].hits
        if hits["external"] <= 0 or hits["local"] > 0:
            found.append(f"{name}: {hits['external']:g} external, {hits['local']:g} local tokens")
        # A hit on the GPU and a loaded one compute the same rows in the same shapes, so they
        # agree bit for bit whatever the kernels do with other shapes.
        same = comparisons[f"{name}_vs_local"]
        if same["bit_equal"] < same["of"]:
            found.append(f"{name}: {same['bit_equal']} of {same['of']} answers as from local KV")
    if comparisons["swapped_vs_cold"]["bit_equal"]:
        found.append("swapped: an answer did not notice its prompt's order; the check is blind")
    floor = comparisons["cold_again_vs_cold"]
    if batch_invariant and floor["bit_equal"] == floor["of"]:
        same = comparisons["loaded_vs_cold"]
        if same["tokens_equal"] < same["of"]:
            found.append(f"loaded: {same['tokens_equal']} of {same['of']} answers as recomputed")
    return found


def run(args: argparse.Namespace, daemon: Daemon | None) -> dict[str, Any]:
    """Both engines, one after the other, and the verdict."""
    vocabulary = json.loads((args.model / "config.json").read_text())["vocab_size"]
    prompts = make_prompts(args.prompts, (args.tokens_min, args.tokens_max), min(vocabulary, 40000))
    wanted = sum((len(p) - 1) // args.block_tokens * args.block_tokens for p in prompts)
    settings = args.connector_settings
    connector = None if daemon is None else kvkeep_connector(daemon.socket, settings)
    before = {} if daemon is None else daemon.counters()
    with vllm_server("engine-1", args, connector) as engine:
        version = engine.http.get("/version").json()["version"]
        phases = first_engine(engine, daemon, prompts, args)
    with vllm_server("engine-2", args, connector) as engine:
        run_phase(engine, prompts[:1] * 2, ["warm-3", "warm-4"])
        phases["restarted"] = run_phase(engine, prompts, ["s"] * len(prompts))
    after = {} if daemon is None else daemon.counters()
    comparisons = {
        f"{name}_vs_{base}": compare(phases[name], phases[base])
        for base, names in COMPARED.items()
        for name in names
    }
    wrong = judge(phases, comparisons, batch_invariant=args.batch_invariant)
    return {
        "passed": not wrong,
        "wrong": wrong,
        "vllm": version,
        "batch_invariant": args.batch_invariant,
        "prompt_tokens": [len(p) for p in prompts],
        "phases": {name: phase.summary(wanted) for name, phase in phases.items()},
        "comparisons": comparisons,
        "copies": bandwidth(before, after),
        "daemon": after,
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_arguments(parser)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens-min", type=int, default=1000)
    parser.add_argument("--tokens-max", type=int, default=4000)
    parser.add_argument("--no-batch-invariant", dest="batch_invariant", action="store_false")
    parser.add_argument("--no-kvkeep", action="store_true", help="only vLLM; the run must fail")
    parser.add_argument("--no-copy-limit", action="store_true", help="leave out what copies can do")
    args = parser.parse_args()
    if args.model is None and args.config is None:
        parser.error("give --model, or --config to make a model from.")
    return args


def run_or_fall_back(args: argparse.Namespace) -> dict[str, Any]:
    """The run; without batch invariance if no server starts with it."""

    def once() -> dict[str, Any]:
        if args.no_kvkeep:
            return run(args, None)
        with kvkeep_daemon(args) as daemon:
            return run(args, daemon)

    try:
        return once()
    except StartError as error:
        if not args.batch_invariant:
            raise
        print(f"{error}: again without batch invariance", flush=True)
        args.batch_invariant = False
        return once()


def begin(args: argparse.Namespace) -> None:
    """Make the folders; from now on a signal, or the limit, ends the program and its children."""
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, _stop_on)
    signal.alarm(args.limit_s)
    for folder in (args.work, args.out):
        folder.mkdir(parents=True, exist_ok=True)


def _stop_on(_number: int, _frame: FrameType | None) -> None:
    """Leave through every ``finally``, which stops the children."""
    raise SystemExit(143)


def main() -> int:
    """Run and report."""
    args = parse_arguments()
    begin(args)
    limits = {} if args.no_copy_limit else copy_limits()
    print(json.dumps({"copy_limit_gb_per_s": limits}), flush=True)
    if args.model is None:
        args.model = args.work / "model"
        make_model(args.config, args.model, num_layers=args.layers)
    try:
        result = run_or_fall_back(args)
    except (RunError, httpx.HTTPError) as error:
        result = {"passed": False, "wrong": [f"{type(error).__name__}: {error}"]}
    result["copy_limit_gb_per_s"] = limits
    (args.out / "answers.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
