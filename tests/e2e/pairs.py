"""A prefill engine, a decode engine and a router before them; questions and their answers."""

import contextlib
import dataclasses
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
from prometheus_client.parser import text_string_to_metric_families

from kvkeep.model.clock import SystemClock
from kvkeep.stack.parts import EnginePart
from kvkeep.stack.precedence import load_spec
from kvkeep.stack.supervisor import Stack
from kvkeep.validate.answer import Answer, TokenStep
from tests.e2e.nixl_threads import SPINNING, settle
from tests.integration.routers import ROUTE, Announced, wait_for
from tests.servers.processes import free_port

Transport = Literal["pool", "nixl"]
BLOCK_TOKENS = 32
REQUEST_TIMEOUT_S = 600.0
MIN_TOKENS = 40
"""Shorter prompts are not handed off."""
MODEL = "smollm2"
LEASE_S = 12
"""How long stock vLLM keeps a prefill's blocks for a decode engine that says nothing."""

# In bfloat16 the order of additions moves logprobs by 0.1 nat with the batch; in float32 by 0.0001.
# Short steps, so that engines soon tell what they do.
_ENGINE = (
    'cpus: "{core}", kv_cache_bytes: 1GiB, max_model_len: 4096, max_num_seqs: 8, '
    "max_num_batched_tokens: 512, dtype: float32"
)
# A machine that has other things to do may stand still for longer than a user would wait.
_PATIENT = "connector_settings: {{patience_ms: 5000, handoff_wait_s: 20}}"
_POOL = f"""\
model: {{model}}
daemon: {{{{pool_bytes: 2GiB}}}}
engines:
  - {{{{name: prefill, {{first}}, {_PATIENT}}}}}
  - {{{{name: decode, {{second}}, {_PATIENT}}}}}
"""
# Stock vLLM: nothing of kvkeep is in these engines.
_NIXL = """\
model: {model}
daemon: {{enabled: false}}
engines:
  - {{name: prefill, {first}, connector: {producer}, env: {{{port_name}: "{ports[0]}", {spin}}}}}
  - {{name: decode, {second}, connector: {consumer}, env: {{{port_name}: "{ports[1]}", {spin}}}}}
"""
_NIXL_CONNECTOR = {
    "kv_connector": "NixlConnector",
    "kv_buffer_device": "cpu",
    "kv_load_failure_policy": "recompute",
    "kv_connector_extra_config": {"kv_lease_duration": LEASE_S},
}


def stack_text(transport: Transport) -> str:
    """A stack file of two engines that hand over in this way, a core each."""
    return (_POOL if transport == "pool" else _NIXL).format(
        model=MODEL,
        first=_ENGINE.format(core=0),
        second=_ENGINE.format(core=1),
        producer=json.dumps({**_NIXL_CONNECTOR, "kv_role": "kv_producer"}),
        consumer=json.dumps({**_NIXL_CONNECTOR, "kv_role": "kv_consumer"}),
        port_name="VLLM_NIXL_SIDE_CHANNEL_PORT",
        ports=(free_port(), free_port()),
        spin=", ".join(f'{name}: "{value}"' for name, value in SPINNING.items()),
    )


class Router(Announced):
    """A router before a pair."""

    @property
    def url(self) -> str:
        """Where clients send requests."""
        return str(self.ready["url"])

    def await_ready(self) -> None:
        """Wait until it takes both engines for ready."""
        wait_for(self, lambda told: told["gauges"]["endpoints_ready"] == 2)


@dataclass
class Pair:
    """Two engines of a running stack; routers before them come and go."""

    transport: Transport
    stack: Stack

    @property
    def prefill(self) -> EnginePart:
        """The engine that computes prompts."""
        return self.stack.engines["prefill"]

    @property
    def decode(self) -> EnginePart:
        """The engine that answers; asked by itself it is the single engine to compare with."""
        return self.stack.engines["decode"]

    def mend(self) -> None:
        """Start again what an earlier fault has ended."""
        for engine in (self.prefill, self.decode):
            if engine.process is not None and not engine.process.is_running():
                engine.restart()

    @contextlib.contextmanager
    def routed(self, relay: Mapping[str, Any], **handoff: Any) -> Iterator["Router"]:
        """A router between the two."""
        if self.transport == "nixl":
            settle({self.prefill: [0], self.decode: [1]})
        engines = [
            {"url": self.prefill.url, "name": "prefill", "role": "prefill"},
            {"url": self.decode.url, "name": "decode", "role": "decode"},
        ]
        settings = {
            "engines": engines,
            "port": 0,
            # Frozen engines are for hand-offs to notice: probes would take them out first.
            "health": {"interval_s": 1.0, "timeout_s": 20.0},
            # NIXL polls on both cores: where there are no others, a prompt takes minutes.
            "relay": {"connections_max": 64, "upstream_silence_s": REQUEST_TIMEOUT_S, **relay},
            "handoff": {
                "transport": self.transport,
                "min_tokens": MIN_TOKENS,
                "prefill_timeout_s": REQUEST_TIMEOUT_S,
                **handoff,
            },
        }
        with tempfile.TemporaryDirectory(prefix="kvkeep-test-") as folder:
            config = Path(folder) / "router.yaml"
            config.write_text(json.dumps(settings))
            router = Router([*ROUTE, "--config", str(config)])
            try:
                router.await_ready()
                yield router
            finally:
                router.stop()

    @contextlib.contextmanager
    def frozen(self, engine: EnginePart) -> Iterator[None]:
        """All processes of an engine stand still."""
        os.killpg(engine.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):  # it may have been killed meanwhile
                os.killpg(engine.pid, signal.SIGCONT)


@contextlib.contextmanager
def running_pair(transport: Transport, folder: Path) -> Iterator[Pair]:
    """Two engines, started and stopped."""
    file = folder / "stack.yaml"
    file.write_text(stack_text(transport))
    with Stack(load_spec(file), state_dir=folder / "state") as stack:
        yield Pair(transport, stack)


# ---- questions and answers


@dataclass(frozen=True)
class Question:
    """One request, whoever answers it."""

    name: str
    text: str
    is_chat: bool
    max_tokens: int = 6

    @property
    def path(self) -> str:
        """Where it is sent."""
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"

    def body(self, *, salt: str, is_streamed: bool) -> dict[str, Any]:
        """Its JSON; with different salts no two requests share KV."""
        body: dict[str, Any] = {
            "model": MODEL,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "cache_salt": salt,
            "return_tokens_as_token_ids": True,
        }
        if self.is_chat:
            messages = [{"role": "user", "content": self.text}]
            body |= {"messages": messages, "logprobs": True, "top_logprobs": 5}
        else:
            body |= {"prompt": self.text, "logprobs": 5}
        if is_streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body


async def ask(
    client: httpx.AsyncClient, question: Question, *, salt: str, is_streamed: bool
) -> Answer:
    """Send a question and read its whole answer; what goes wrong is in ``error``.

    Of a streamed answer its first token is timed.
    """
    body = question.body(salt=salt, is_streamed=is_streamed)
    begun_s = SystemClock().now_s()
    first_s: float | None = None
    chunks: list[dict[str, Any]] = []
    error = None
    try:
        async with client.stream("POST", question.path, json=body) as response:
            if response.status_code != httpx.codes.OK:
                await response.aread()
                error = f"HTTP {response.status_code}: {response.text[:300]}"
            elif is_streamed:
                async for chunk in _events(response):
                    first_s = first_s or (SystemClock().now_s() if _has_token(chunk) else None)
                    chunks.append(chunk)
            else:
                await response.aread()
                chunks = [response.json()]
    except httpx.HTTPError as failure:
        error = f"{type(failure).__name__}: {failure}"
    ttft_s = None if first_s is None else first_s - begun_s
    return dataclasses.replace(_joined(chunks, error), ttft_s=ttft_s)


def _has_token(chunk: Mapping[str, Any]) -> bool:
    return any(choice.get("logprobs") for choice in chunk.get("choices") or ())


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data:") and line[5:].strip() != "[DONE]":
            yield json.loads(line[5:])


def _joined(chunks: Sequence[Mapping[str, Any]], error: str | None) -> Answer:
    text, steps, finish_reason = "", [], None
    usage: Mapping[str, Any] = {}
    for chunk in chunks:
        error = json.dumps(chunk["error"]) if "error" in chunk else error
        usage = chunk.get("usage") or usage
        for choice in chunk.get("choices") or ():
            said = choice.get("message") or choice.get("delta") or choice
            text += said.get("content") or said.get("text") or ""
            steps += _steps(choice.get("logprobs") or {})
            finish_reason = choice.get("finish_reason") or finish_reason
    return Answer(
        text=text,
        steps=tuple(steps),
        finish_reason=finish_reason,
        error=error,
        prompt_tokens=usage.get("prompt_tokens"),
    )


def _steps(logprobs: Mapping[str, Any]) -> list[TokenStep]:
    """Steps out of a chat's or a completion's log probabilities."""
    if "content" in logprobs:
        return [
            TokenStep(
                item["token"],
                item["logprob"],
                _ranked({other["token"]: other["logprob"] for other in item["top_logprobs"]}),
            )
            for item in logprobs["content"] or ()
        ]
    columns = (logprobs.get(name) or () for name in ("tokens", "token_logprobs", "top_logprobs"))
    return [
        TokenStep(token, logprob, _ranked(top))
        for token, logprob, top in zip(*columns, strict=True)
    ]


def _ranked(top: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(top.items(), key=lambda pair: -pair[1]))


# ---- what engines and routers count


def read_metrics(url: str) -> dict[str, float]:
    """Samples of ``/metrics``, summed over their labels."""
    text = httpx.get(f"{url}/metrics", trust_env=False, timeout=30).raise_for_status().text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def since(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What was counted in between."""
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def client_of(url: str) -> httpx.AsyncClient:
    """A client that no proxy stands before."""
    return httpx.AsyncClient(base_url=url, timeout=REQUEST_TIMEOUT_S, trust_env=False)
