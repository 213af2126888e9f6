"""The processes of a run on a GPU host: a kvkeep daemon, vLLM servers, and how to talk to them."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

ANSWER_TOKENS = 16
TOP_LOGPROBS = 5
COUNTERS = {
    "queries": "vllm:prefix_cache_queries_total",
    "local": "vllm:prefix_cache_hits_total",
    "external": "vllm:external_prefix_cache_hits_total",
}


class RunError(Exception):
    """Something did not come up or did not answer; the message is for the reader of the run."""


def wait_for(
    what: str, ready: Callable[[], bool], *, timeout_s: float, every_s: float = 0.2
) -> None:
    """Poll until ``ready``; a wait without end would eat the lease of the host.

    Raises:
        RunError: Not ready in time.
    """
    until = time.perf_counter() + timeout_s
    while not ready():
        if time.perf_counter() > until:
            raise RunError(f"{what}: not in {timeout_s:g} s")
        time.sleep(every_s)


class StartError(RunError):
    """A server ended, or stayed silent, before it served."""


class Child:
    """A process group with its log; stays in this session, so that it ends with it."""

    def __init__(self, name: str, command: Sequence[str], out: Path, env: dict[str, str]) -> None:
        self.name = name
        self.log = out / f"{name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | env,
                process_group=0,
            )

    def check(self) -> None:
        """Raise if it is no longer running."""
        if self.process.poll() is not None:
            raise StartError(f"{self.name} ended with {self.process.returncode}")

    def tail(self, num_lines: int = 60) -> str:
        """The last lines it logged."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(f"  {self.name}| {line[:300]}" for line in lines[-num_lines:])

    def stop(self) -> None:
        """End the whole group, politely first, and wait for all of it: a worker holds the GPU."""
        for how, patience_s in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
            try:
                os.killpg(self.process.pid, how)
                wait_for(f"end of {self.name}", self._is_gone, timeout_s=patience_s)
            except ProcessLookupError:
                return
            except RunError:
                continue
            return

    def _is_gone(self) -> bool:
        self.process.poll()
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return True
        return False


@contextmanager
def running(child: Child) -> Iterator[Child]:
    """The child for the time of the block; its log's end is shown if the block fails."""
    is_done = False
    try:
        yield child
        is_done = True
    finally:
        if not is_done:
            print(child.tail(), flush=True)
        child.stop()


@dataclass
class Answer:
    """What one prompt got."""

    tokens: list[str]
    logprobs: list[float]
    """Of the chosen tokens."""
    top: list[dict[str, float]]
    """The most likely tokens at each position."""
    first_s: float
    """Seconds from sending to the first token."""


class Engine:
    """The HTTP face of one vLLM server."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=60.0)

    def is_up(self) -> bool:
        """Whether it serves."""
        try:
            return self.http.get("/health", timeout=2.0).is_success
        except httpx.HTTPError:
            return False

    def ask(self, prompt: list[int], salt: str) -> Answer:
        """Continue a prompt greedily; streamed, so that the first token can be timed."""
        body = {
            "model": "m", "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0,
            "ignore_eos": True, "logprobs": TOP_LOGPROBS, "return_tokens_as_token_ids": True,
            "cache_salt": salt, "stream": True,
        }  # fmt: skip
        answer, begun = Answer([], [], [], 0.0), time.perf_counter()
        with self.http.stream("POST", "/v1/completions", json=body) as response:
            if not response.is_success:
                raise RunError(f"HTTP {response.status_code}: {response.read().decode()[:500]}")
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                answer.first_s = answer.first_s or time.perf_counter() - begun
                for choice in json.loads(line[6:]).get("choices", []):
                    found = choice.get("logprobs") or {}
                    answer.tokens += found.get("tokens") or []
                    answer.logprobs += found.get("token_logprobs") or []
                    answer.top += found.get("top_logprobs") or []
        return answer

    def first_token_s(self, prompt: list[int]) -> float:
        """Seconds from sending a prompt to the first streamed token, its only one."""
        body = {
            "model": "m", "prompt": prompt, "max_tokens": 1, "temperature": 0,
            "ignore_eos": True, "stream": True,
        }  # fmt: skip
        first_s, begun = 0.0, time.perf_counter()
        with self.http.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    first_s = first_s or time.perf_counter() - begun
        return first_s

    def counters(self) -> dict[str, float]:
        """Prompt tokens asked for, hit locally and hit outside the engine, so far."""
        totals = dict.fromkeys(COUNTERS, 0.0)
        for line in self.http.get("/metrics").text.splitlines():
            for name, metric in COUNTERS.items():
                if line.startswith(metric + "{") or line.startswith(metric + " "):
                    totals[name] += float(line.split()[-1])
        return totals

    def reset(self) -> None:
        """Empty the engine's own prefix cache; refused while stores are in flight."""

        def is_reset() -> bool:
            response = self.http.post("/reset_prefix_cache")
            return response.is_success and bool(response.json()["success"])

        wait_for("reset of the prefix cache", is_reset, timeout_s=60)


def room_for_pool(wanted_bytes: int) -> int:
    """Bytes the pool may have: /dev/shm grows where that is allowed, else the pool shrinks."""
    if shutil.disk_usage("/dev/shm").free < wanted_bytes * 1.1:
        size = f"size={int(wanted_bytes * 1.3)}"
        subprocess.run(["mount", "-o", f"remount,{size}", "/dev/shm"], check=False)
    free = shutil.disk_usage("/dev/shm").free
    given = min(wanted_bytes, int(free * 0.8))
    print(f"pool {given >> 20} MiB, /dev/shm has {free >> 20} MiB free", flush=True)
    return given


class Daemon:
    """The HTTP face of one kvkeep daemon."""

    def __init__(self, child: Child, socket: str) -> None:
        self.child, self.socket, self.port = child, socket, 0

    def wait_until_ready(self) -> None:
        """Wait for the line that says where it listens."""

        def is_ready() -> bool:
            self.child.check()
            for line in self.child.log.read_text().splitlines():
                if line.startswith('{"event": "ready"') and line.endswith("}"):
                    self.port = json.loads(line)["metrics_port"]
            return self.port > 0

        wait_for("daemon ready", is_ready, timeout_s=120)

    def counters(self) -> dict[str, int]:
        """Monotone counters."""
        reply = httpx.get(f"http://127.0.0.1:{self.port}/status", timeout=10.0).json()
        return dict(reply["counters"])

    def wait_until_stored(self) -> None:
        """Wait until two seconds pass in which nothing more is stored."""
        seen, since_s = -1, time.perf_counter()

        def is_quiet() -> bool:
            nonlocal seen, since_s
            stored = self.counters()["blocks_stored"]
            if stored != seen:
                seen, since_s = stored, time.perf_counter()
            return time.perf_counter() - since_s > 2.0

        wait_for("stores to end", is_quiet, timeout_s=90)


@contextmanager
def kvkeep_daemon(args: argparse.Namespace, *options: str) -> Iterator[Daemon]:
    """A daemon for the time of the block, with further options of its command line."""
    socket, pool = f"{args.work}/kvkeep.sock", Path("/dev/shm/kvkeep-answers.pool")
    pool.unlink(missing_ok=True)
    command = [
        sys.executable, "-c", "from kvkeep.cli.daemon import daemon; daemon()",
        "--socket", socket, "--pool", str(pool),
        "--pool-bytes", str(room_for_pool(args.pool_gib << 30)), *options,
    ]  # fmt: skip
    try:
        with running(Child("daemon", command, args.out, {})) as child:
            daemon = Daemon(child, socket)
            daemon.wait_until_ready()
            yield daemon
    finally:
        pool.unlink(missing_ok=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every run with engines takes."""
    parser.add_argument("--config", type=Path, help="folder with config.json and tokenizer files")
    parser.add_argument("--layers", type=int, default=12, help="layers of the model made from it")
    parser.add_argument("--model", type=Path, help="a model to use instead")
    parser.add_argument("--work", type=Path, default=Path("/tmp/kvkeep-answers"))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "results")))
    parser.add_argument("--pool-gib", type=int, default=24)
    parser.add_argument("--block-tokens", type=int, default=16)
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--start-s", type=float, default=240.0, help="patience with a server")
    parser.add_argument("--limit-s", type=int, default=570, help="the whole run ends by then")
    parser.add_argument("--engine-arg", action="append", default=[], help="for vLLM; repeatable")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="connector_settings",
        help="a setting of kvkeep's connector, such as gpu_copies=direct; repeatable",
    )  # fmt: skip


def kvkeep_connector(socket: str, settings: Sequence[str]) -> dict[str, Any]:
    """What makes vLLM load the connector, with settings as ``NAME=VALUE``."""
    named = dict(setting.split("=", 1) for setting in settings)
    return {
        "kv_connector": "KvkeepConnector",
        "kv_connector_module_path": "kvkeep.connector.plugin",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"socket": socket, **named},
    }


@contextmanager
def vllm_server(
    name: str, args: argparse.Namespace, connector: dict[str, Any] | None
) -> Iterator[Engine]:
    """A vLLM server for the time of the block, with a ``--kv-transfer-config`` or without."""
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(args.model),
        "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(args.port),
        "--max-model-len", str(args.max_model_len), "--max-logprobs", "20",
        "--block-size", str(args.block_tokens), "--enforce-eager", *args.engine_arg,
    ]  # fmt: skip
    if connector is not None:
        command += ["--kv-transfer-config", json.dumps(connector)]
    env = {
        "VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONHASHSEED": "0",
        "VLLM_BATCH_INVARIANT": str(int(args.batch_invariant)),
    }  # fmt: skip
    with running(Child(name, command, args.out, env)) as child:
        engine, begun = Engine(f"http://127.0.0.1:{args.port}"), time.perf_counter()

        def is_up() -> bool:
            child.check()
            return engine.is_up()

        try:
            wait_for(f"{name} up", is_up, timeout_s=args.start_s, every_s=1.0)
        except RunError as error:
            raise StartError(str(error)) from error
        print(f"{name} up after {time.perf_counter() - begun:.0f} s", flush=True)
        yield engine
