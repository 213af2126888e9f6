"""A real vLLM engine in a process of its own, and the counters that prove where KV came from.

Every subject of a comparison starts the same command line with the same settings; only the
interpreter (its environment), the KV transfer configuration and a few variables differ.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvkeep.model.errors import UnavailableError
from kvkeep.stack.process import StackProcess

HOST = "127.0.0.1"
SERVED_NAME = "bench"
BLOCK_TOKENS = 32
START_TIMEOUT_S = 420.0
POLL_S = 0.2
REQUEST_TIMEOUT_S = 120.0

# Several components choose the machine's outward address by themselves; these keep all on loopback.
LOOPBACK = {
    "VLLM_HOST_IP": HOST,
    "GLOO_SOCKET_IFNAME": "lo",
    "MC_TCP_BIND_ADDRESS": HOST,
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "LMCACHE_TRACK_USAGE": "false",
}

COUNTERS = {
    "local_queries": "vllm:prefix_cache_queries_total",
    "local_hits": "vllm:prefix_cache_hits_total",
    "external_queries": "vllm:external_prefix_cache_queries_total",
    "external_hits": "vllm:external_prefix_cache_hits_total",
}


@dataclass(frozen=True)
class EngineSpec:
    """What distinguishes one engine from another.

    Args:
        python: Interpreter of the environment that holds vLLM.
        model: Folder of the model's safetensors and tokenizer.
        cores: CPU cores of the worker's threads, as VLLM_CPU_OMP_THREADS_BIND takes them.
        kv_transfer_config: Value of `--kv-transfer-config`; None for no connector.
        env: Further environment variables.
    """

    python: Path
    model: Path
    cores: str = "0-1"
    kv_transfer_config: Mapping[str, Any] | None = None
    env: Mapping[str, str] = field(default_factory=dict)

    def command(self, port: int) -> list[str]:
        """Return the engine's command line."""
        line = [str(self.python), "-m", "vllm.entrypoints.openai.api_server"]
        line += ["--model", str(self.model), "--served-model-name", SERVED_NAME]
        line += ["--host", HOST, "--port", str(port), "--dtype", "bfloat16"]
        line += ["--block-size", str(BLOCK_TOKENS), "--max-model-len", "8192"]
        line += ["--max-num-seqs", "16", "--enable-prompt-tokens-details"]
        line += ["--disable-uvicorn-access-log"]
        if self.kv_transfer_config is not None:
            line += ["--kv-transfer-config", json.dumps(dict(self.kv_transfer_config))]
        return line

    def environment(self) -> dict[str, str]:
        """Return the engine's environment variables."""
        env = dict(os.environ) | LOOPBACK
        env["VLLM_CPU_KVCACHE_SPACE"] = "2"  # GiB: 90 k tokens, far above what a run holds
        env["VLLM_SERVER_DEV_MODE"] = "1"  # for POST /reset_prefix_cache
        env["VLLM_CPU_OMP_THREADS_BIND"] = self.cores
        env["PYTHONHASHSEED"] = "0"  # peers key stored blocks by vLLM's own, seeded, hashes
        return env | dict(self.env)


@dataclass(frozen=True)
class Answer:
    """One streamed completion.

    Args:
        first_token_s: From sending the request to reading the first token, in seconds.
        token_ids: The tokens generated.
        cached_tokens: Prompt tokens that were not computed, as the engine reports them.
        prompt_tokens: Length of the prompt.
        top_logprobs: Per generated token, the most likely candidates and their log probability.
        gaps_s: Between the arrivals of tokens, in seconds.
    """

    first_token_s: float
    token_ids: tuple[int, ...]
    cached_tokens: int
    prompt_tokens: int
    top_logprobs: tuple[Mapping[str, float], ...] = ()
    gaps_s: tuple[float, ...] = ()


class EngineError(RuntimeError):
    """An engine or a peer's server did not do its part; the message says where to look."""


def free_port() -> int:
    """Return a TCP port of the loopback interface that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
        return port


def listens(port: int) -> bool:
    """Return whether something accepts connections on a port of the loopback interface."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((HOST, port)) == 0


class Engine:
    """A client of one running engine; opens one connection a request, as most callers do."""

    def __init__(self, port: int) -> None:
        self.port = port

    def call(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        """Send one request and return (HTTP status, body)."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=REQUEST_TIMEOUT_S)
        with closing(connection):
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()

    def counters(self) -> dict[str, float]:
        """Return the engine's prefix cache counters, in tokens."""
        _, text = self.call("GET", "/metrics")
        found = dict.fromkeys(COUNTERS, 0.0)
        for line in text.decode().splitlines():
            for name, metric in COUNTERS.items():
                if line.startswith((metric + "{", metric + " ")):
                    found[name] += float(line.rsplit(" ", 1)[1])
        return found

    def reset_prefix_cache(self, timeout_s: float = 10.0) -> None:
        """Forget every block the engine itself holds; retried, as stores in flight forbid it.

        Raises:
            EngineError: It was refused until `timeout_s` had passed.
        """
        deadline = time.perf_counter() + timeout_s
        while time.perf_counter() < deadline:
            status, body = self.call("POST", "/reset_prefix_cache")
            if status == 200 and (not body or json.loads(body).get("success", True)):
                return
            time.sleep(0.02)
        raise EngineError(f"the engine on port {self.port} refused to reset its prefix cache")

    def prompt_of(self, text: str, num_tokens: int) -> str:
        """Return the beginning of `text` that is `num_tokens` tokens long for this model.

        Raises:
            EngineError: The text is shorter than that.
        """
        _, body = self.call("POST", "/tokenize", {"model": SERVED_NAME, "prompt": text})
        ids = json.loads(body)["tokens"][:num_tokens]
        if len(ids) < num_tokens:
            raise EngineError(f"a text of {len(ids)} tokens is too short, {num_tokens} are needed")
        _, body = self.call("POST", "/detokenize", {"model": SERVED_NAME, "tokens": ids})
        prompt: str = json.loads(body)["prompt"]
        return prompt

    def complete(
        self,
        prompt: str,
        *,
        max_tokens: int = 4,
        logprobs: int | None = None,
        salt: str | None = None,
        begun: Callable[[], object] = lambda: None,
    ) -> Answer:
        """Stream one greedy completion and time its first token.

        Args:
            prompt: What to go on with.
            max_tokens: So many are generated.
            logprobs: How many candidates to tell of each token.
            salt: Requests with different ones share no KV.
            begun: Called when the first token is there.
        """
        body = {
            "model": SERVED_NAME,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "ignore_eos": True,
        }
        if logprobs is not None:
            body["logprobs"] = logprobs
        if salt is not None:
            body["cache_salt"] = salt
        payload = json.dumps(body)
        connection = http.client.HTTPConnection(HOST, self.port, timeout=REQUEST_TIMEOUT_S)
        with closing(connection):
            began = time.perf_counter()
            connection.request(
                "POST", "/v1/completions", payload, {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            if response.status != 200:
                raise EngineError(f"HTTP {response.status}: {response.read()[:300]!r}")
            return _read_stream(response, began, begun)


def _read_stream(
    response: http.client.HTTPResponse, began: float, begun: Callable[[], object]
) -> Answer:
    first_token_s = 0.0
    arrivals: list[float] = []
    token_ids: list[int] = []
    top: list[Mapping[str, float]] = []
    usage: dict[str, Any] = {}
    for line in iter(response.readline, b""):
        if not line.startswith(b"data: {"):
            continue
        arrived = time.perf_counter()
        event = json.loads(line[6:])
        if "error" in event:
            raise EngineError(f"the engine answered with an error: {event['error']}")
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            if choice.get("token_ids") and not token_ids:
                first_token_s = arrived - began
                begun()
            arrivals += [arrived] * bool(choice.get("token_ids"))
            token_ids += choice.get("token_ids") or ()
            top += (choice.get("logprobs") or {}).get("top_logprobs") or ()
    details = usage.get("prompt_tokens_details") or {}
    return Answer(
        first_token_s=first_token_s,
        token_ids=tuple(token_ids),
        cached_tokens=int(details.get("cached_tokens") or 0),
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        top_logprobs=tuple(top),
        gaps_s=tuple(later - earlier for earlier, later in itertools.pairwise(arrivals)),
    )


@contextmanager
def process(command: list[str], env: Mapping[str, str], log: Path) -> Iterator[StackProcess]:
    """Run a process until the end of the block, or of this process, whichever comes first.

    Nothing that it started outlives it. The log is begun anew.

    Raises:
        EngineError: It cannot be started.
    """
    log.unlink(missing_ok=True)
    child = StackProcess(Path(command[0]).name, log)
    try:
        child.start(command, environment=env, folder=Path.cwd())
        yield child
    except UnavailableError as error:
        raise EngineError(str(error)) from error
    finally:
        child.stop()


def wait_until(ready: Callable[[], bool], child: StackProcess, what: str) -> None:
    """Poll `ready` until it is true.

    Raises:
        EngineError: The process ended, or START_TIMEOUT_S passed.
    """
    deadline = time.perf_counter() + START_TIMEOUT_S
    while time.perf_counter() < deadline:
        if not child.is_running():
            raise EngineError(f"{what} ended while starting: {child.why_failed()}")
        with suppress(OSError, http.client.HTTPException):
            if ready():
                return
        time.sleep(POLL_S)
    raise EngineError(f"{what} was not ready in {START_TIMEOUT_S:.0f} s: {child.why_failed()}")


@contextmanager
def engine(spec: EngineSpec, log: Path) -> Iterator[Engine]:
    """Start an engine, wait until it has answered a completion, and stop it at the end."""
    port = free_port()
    with process(spec.command(port), spec.environment(), log) as child:
        client = Engine(port)
        wait_until(lambda: client.call("GET", "/health")[0] == 200, child, "the engine")
        client.complete("Ready?", max_tokens=2)
        yield client
