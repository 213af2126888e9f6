"""Time to first token by prompt length and by where the prompt's KV lies, for several subjects.

One server a subject, one after the other on the same GPU: ``none`` (no connector), ``staged`` and
``direct`` (kvkeep's two ways of copying), ``native`` (vLLM's OffloadingConnector) and ``lmcache``
(its multi-process connector, where it is installed). The model is of the given shape with dummy
weights, all its layers: the text is meaningless and the time is real. For each length:

* computed: the first sight of each prompt, stores included;
* on_gpu: the second, from the engine's own prefix cache;
* loaded: after a reset, so that the KV comes from outside; several rounds.

A row says how long the KV's bytes alone take over this host's bus, and which share of the prompts
was served from outside: a row below 0.9 says nothing of loads.

    PYTHONPATH=/tmp/site:src python3 -m benchmarks.gpu.ttft --model /tmp/site/qwen3-14b
"""

import argparse
import importlib.util
import json
import random
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from benchmarks.gpu.answers import begin
from benchmarks.gpu.copy_limit import copy_limits
from benchmarks.gpu.processes import (
    Child,
    Engine,
    RunError,
    add_arguments,
    kvkeep_connector,
    kvkeep_daemon,
    running,
    vllm_server,
    wait_for,
)

SUBJECTS = ("none", "staged", "direct", "native", "lmcache")
LMCACHE_PORT, LMCACHE_HTTP_PORT, LMCACHE_METRICS_PORT = 6555, 8155, 9155
VOCABULARY = 40_000
LOADED_ROUNDS = 3
ON_GPU_ROUNDS = 3
REST_S = 2.0
"""Before loads are counted: peers store behind the answer and say nothing of its end."""


def bytes_per_token(config: dict[str, Any]) -> int:
    """KV of a token, all layers, in bf16."""
    heads = config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(config["num_hidden_layers"] * heads * size * 2 * 2)


@contextmanager
def lmcache_server(args: argparse.Namespace) -> Iterator[Child]:
    """LMCache's own process."""
    command = [
        sys.executable, "-c", "import sys; from lmcache.cli.main import main; sys.exit(main())",
        "server", "--host", "127.0.0.1", "--port", str(LMCACHE_PORT),
        "--l1-size-gb", str(args.pool_gib), "--eviction-policy", "LRU",
        "--http-port", str(LMCACHE_HTTP_PORT), "--prometheus-port", str(LMCACHE_METRICS_PORT),
    ]  # fmt: skip
    env = {"LMCACHE_TRACK_USAGE": "false", "PYTHONHASHSEED": "0"}
    with running(Child("lmcache-server", command, args.out, env)) as child:

        def is_up() -> bool:
            child.check()
            with socket.socket() as found:
                return found.connect_ex(("127.0.0.1", LMCACHE_PORT)) == 0

        wait_for("LMCache's server", is_up, timeout_s=60)
        yield child


@contextmanager
def connector(subject: str, args: argparse.Namespace) -> Iterator[dict[str, Any] | None]:
    """What the subject's server is configured with; what it needs beside it runs meanwhile."""
    if subject in ("staged", "direct"):
        with kvkeep_daemon(args) as daemon:
            settings = [*args.connector_settings, f"gpu_copies={subject}"]
            yield kvkeep_connector(daemon.socket, settings)
    elif subject == "native":
        yield {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": args.pool_gib << 30},
        }
    elif subject == "lmcache":
        with lmcache_server(args):
            yield {
                "kv_connector": "LMCacheMPConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {
                    "lmcache.mp.host": "tcp://127.0.0.1",
                    "lmcache.mp.port": LMCACHE_PORT,
                },
            }
    else:
        yield None


def median_ms(seconds: list[float]) -> float:
    """Of some prompts."""
    return round(1e3 * statistics.median(seconds), 1)


def measure_length(
    engine: Engine, num_tokens: int, num_prompts: int, *, has_store: bool
) -> dict[str, Any]:
    """All places of prompts of a length; new prompts each time, the same for every subject."""
    chance = random.Random(num_tokens)
    prompts = [
        [chance.randrange(100, VOCABULARY) for _ in range(num_tokens)] for _ in range(num_prompts)
    ]
    computed = [engine.first_token_s(prompt) for prompt in prompts]
    on_gpu = [engine.first_token_s(prompt) for _ in range(ON_GPU_ROUNDS) for prompt in prompts]
    row: dict[str, Any] = {
        "tokens": num_tokens,
        "computed_ms": median_ms(computed),
        "on_gpu_ms": median_ms(on_gpu),
    }
    if has_store:
        time.sleep(REST_S)
        before, loaded = engine.counters(), []
        for _ in range(LOADED_ROUNDS):
            engine.reset()
            loaded += [engine.first_token_s(prompt) for prompt in prompts]
        hits = engine.counters()["external"] - before["external"]
        row |= {
            "loaded_ms": median_ms(loaded),
            "loaded_min_max_ms": [round(1e3 * f(loaded), 1) for f in (min, max)],
            "served": round(hits / (num_tokens * len(loaded)), 3),
        }
    return row


def measure(subject: str, args: argparse.Namespace, rate_gb_s: float) -> list[dict[str, Any]]:
    """Every length on one server."""
    per_token = bytes_per_token(json.loads((args.model / "config.json").read_text()))
    rows = []
    with connector(subject, args) as config, vllm_server(subject, args, config) as engine:
        chance = random.Random(0)
        for num_tokens in args.lengths:  # kernels are loaded at their first use
            prompt = [chance.randrange(100, VOCABULARY) for _ in range(num_tokens)]
            for _ in range(2):
                engine.first_token_s(prompt)
            if config is not None:
                engine.reset()
                engine.first_token_s(prompt)
        for num_tokens in args.lengths:
            num_prompts = args.prompts if num_tokens < args.long_tokens else args.long_prompts
            row = {"subject": subject} | measure_length(
                engine, num_tokens, num_prompts, has_store=config is not None
            )
            if rate_gb_s:
                row["wire_ms"] = round(num_tokens * per_token / rate_gb_s / 1e6, 1)
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_arguments(parser)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[1000, 2048, 10_000, 32_000])
    parser.add_argument("--prompts", type=int, default=6, help="of each length")
    parser.add_argument("--long-tokens", type=int, default=20_000, help="from which on fewer")
    parser.add_argument("--long-prompts", type=int, default=3)
    parser.add_argument("--no-copy-limit", action="store_true", help="leave out what copies can do")
    parser.set_defaults(max_model_len=32_768, pool_gib=32, batch_invariant=False)
    args = parser.parse_args()
    if args.model is None:
        parser.error("give --model: a folder with config.json and tokenizer files.")
    args.engine_arg = ["--load-format=dummy", *args.engine_arg]
    return args


def main() -> int:
    """Measure each subject; 1 if any could not be."""
    args = parse_arguments()
    begin(args)
    limits: dict[str, Any] = {} if args.no_copy_limit else copy_limits()
    print(json.dumps({"copy_limit_gb_per_s": limits}), flush=True)
    rows: list[dict[str, Any]] = []
    num_failed = 0
    for subject in args.subjects:
        if subject == "lmcache" and importlib.util.find_spec("lmcache") is None:
            print("lmcache is not installed here and left out", flush=True)
            continue
        try:
            rows += measure(subject, args, float(limits.get("to_gpu.65536k", 0.0)))
        except (RunError, httpx.HTTPError) as error:
            num_failed += 1
            print(f"{subject}: {type(error).__name__}: {error}", flush=True)
        (args.out / "ttft.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    return 1 if num_failed else 0


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for people, lengths together."""
    names = ["subject", "tokens", "computed_ms", "on_gpu_ms", "loaded_ms", "served", "wire_ms"]
    ordered = sorted(rows, key=lambda row: int(row["tokens"]))
    lines = ["".join(f"{row.get(name, '-')!s:>12}" for name in names) for row in ordered]
    return "\n".join(["".join(f"{name:>12}" for name in names), *lines])


if __name__ == "__main__":
    sys.exit(main())
