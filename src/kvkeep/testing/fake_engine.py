"""An engine without a model: an OpenAI-compatible server with a believable prefix cache.

It tokenizes by words, keeps "KV" blocks in an own prefix cache, stores and loads them through an
optional outside store (`kvkeep.testing.fake_kv`), counts like vLLM and answers from the KV it
ended up with.

`FakeEngine.handle` is pure request to reply and needs no socket (`kvkeep.testing.fake_transport`
wraps it for httpx); `serve` puts it behind aiohttp; ``python -m kvkeep.testing.fake_engine`` runs
it as a process that prints one JSON line when it is ready.
"""

import asyncio
import json
import signal
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import click
from aiohttp import web

from kvkeep.testing.fake_kv import FakeKv, FakeStore, Faults, Token, token_id

SYSTEM_WORDS = ("<system>", "You", "are", "a", "helpful", "assistant.", "<user>")


@dataclass(slots=True)
class Reply:
    """An HTTP reply: pieces with the seconds to wait before each of them."""

    status: int = 200
    content_type: str = "application/json"
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        """All pieces at once."""
        return b"".join(piece for _, piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of work, 0 by default so that tests need no waiting."""

    prefill_s_per_token: float = 0.0
    load_s_per_token: float = 0.0
    decode_s_per_token: float = 0.0


class FakeEngine(FakeKv):
    """One engine behind OpenAI's HTTP interface, without a socket."""

    def __init__(
        self,
        *,
        store: FakeStore | None = None,
        model: str = "fake-model",
        timing: Timing | None = None,
        **more: Any,
    ) -> None:
        """Start empty.

        Args:
            store: Where blocks go and come from; None is an engine alone.
            model: Name it serves.
            timing: How slow it is.
            more: What `FakeKv` takes.
        """
        super().__init__(store=store, **more)
        self.model, self.timing = model, timing or Timing()
        self._num_requests = self._num_resets = 0

    def handle(self, method: str, path: str, body: bytes = b"") -> Reply:
        """Answer one request; the path is without its query."""
        route = {
            ("GET", "/health"): Reply,
            ("GET", "/v1/models"): self._models,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/status"): self._status,
            ("GET", "/server_info"): self._server_info,
            ("POST", "/reset_prefix_cache"): self._reset,
        }.get((method, path))
        if route is not None:
            return route()
        if method == "POST" and path in ("/v1/chat/completions", "/v1/completions"):
            return self._complete(body, is_chat=path.startswith("/v1/chat"))
        return _json({"error": {"message": f"no {method} {path}"}}, 404)

    def _models(self) -> Reply:
        card = {"id": self.model, "object": "model", "max_model_len": 8192}
        return _json({"object": "list", "data": [card]})

    def _status(self) -> Reply:
        if self.store is None:
            return _json({"error": {"message": "no store"}}, 404)
        return _json({"counters": self.store.counters})

    def _server_info(self) -> Reply:
        scheduler = {"max_num_batched_tokens": self.block_tokens, "max_num_seqs": 1}
        return _json({"vllm_config": {"scheduler_config": scheduler}})

    def _metrics(self) -> Reply:
        labels = f'block_size="{self.block_tokens}",num_gpu_blocks="{self.num_blocks}"'
        lines = [
            "# TYPE vllm:cache_config_info gauge",
            f"vllm:cache_config_info{{{labels}}} 1.0",
        ]
        for name, value in self.counters.items():
            full = f"vllm:{name}_total"
            lines += [f"# TYPE {full} counter", f'{full}{{engine="0"}} {float(value)}']
        return Reply(200, "text/plain", [(0.0, ("\n".join(lines) + "\n").encode())])

    def _reset(self) -> Reply:
        self._num_resets += 1
        refusals = self.faults.reset_refusals
        if refusals < 0 or self._num_resets <= refusals:
            return _json({"success": False})
        if not self.faults.reset_lies:
            self.cache.clear()
        if self.faults.counters_fall:
            self.counters["prefix_cache_hits"] = 0
        return _json({"success": True})

    def _complete(self, body: bytes, *, is_chat: bool) -> Reply:
        try:
            asked = json.loads(body)
            words = _chat_words(asked["messages"]) if is_chat else _prompt_words(asked["prompt"])
        except (ValueError, KeyError, TypeError) as error:
            return _json({"error": {"message": f"bad request: {error}"}}, 400)
        if asked.get("model") not in (None, self.model):
            return _json({"error": {"message": f"no model {asked['model']}"}}, 404)
        self._num_requests += 1
        if _hits(self._num_requests, self.faults.fail_every):
            return _json({"error": {"message": "planted failure"}}, 500)
        blocks, local, external = self.prefill(words, str(asked.get("cache_salt") or ""))
        max_tokens = int(asked.get("max_tokens") or 16)
        tokens = list(self.generate(words, blocks, max_tokens, reused=local + external > 0))
        timing = self.timing
        computed = len(words) - local - external
        wait_s = timing.prefill_s_per_token * computed + timing.load_s_per_token * external
        chunks = self._chunks(asked, words, tokens, local + external)
        if not asked.get("stream"):
            whole = _merge_chunks(chunks, self.model, is_chat=is_chat)
            return _json(whole, wait_s=wait_s + timing.decode_s_per_token * len(tokens))
        return self._stream(chunks if is_chat else _as_text_chunks(chunks), wait_s)

    def _stream(self, chunks: list[dict[str, Any]], wait_s: float) -> Reply:
        done = (0.0, b"data: [DONE]\n\n")
        if _hits(self._num_requests, self.faults.empty_every):
            return Reply(200, "text/event-stream", [done])
        pieces = [
            (
                wait_s if i == 0 else self.timing.decode_s_per_token,
                b"data: " + json.dumps(chunk).encode() + b"\n\n",
            )
            for i, chunk in enumerate(chunks)
        ]
        if _hits(self._num_requests, self.faults.cut_every):
            return Reply(200, "text/event-stream", pieces[: len(pieces) // 2])
        return Reply(200, "text/event-stream", [*pieces, done])

    def _chunks(
        self,
        asked: Mapping[str, Any],
        words: Sequence[str],
        tokens: Sequence[Token],
        cached_tokens: int,
    ) -> list[dict[str, Any]]:
        """One chunk per token in OpenAI's form with vLLM's extras, and one for usage."""
        by_id, num_top = bool(asked.get("return_tokens_as_token_ids")), asked.get("top_logprobs")
        common = {"id": f"chatcmpl-{self._num_requests}", "model": self.model}
        chunks: list[dict[str, Any]] = []
        for i, token in enumerate(tokens):
            last = i == len(tokens) - 1
            choice: dict[str, Any] = {
                "index": 0,
                "delta": {"content": token.word + " "},
                "finish_reason": "length" if last else None,
            }
            if asked.get("logprobs"):
                choice["logprobs"] = {"content": [_logprobs(token, int(num_top or 0), by_id)]}
            chunks.append({**common, "choices": [choice]})
        if asked.get("return_token_ids") and chunks:
            chunks[0]["prompt_token_ids"] = [token_id(word) for word in words]
        usage = {
            "prompt_tokens": len(words),
            "completion_tokens": len(tokens),
            "total_tokens": len(words) + len(tokens),
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }
        if (asked.get("stream_options") or {}).get("include_usage") or not asked.get("stream"):
            chunks.append({**common, "choices": [], "usage": usage})
        return chunks


def _hits(count: int, every: int) -> bool:
    return bool(every) and count % every == 0


def _json(value: Mapping[str, Any], status: int = 200, *, wait_s: float = 0.0) -> Reply:
    return Reply(status, "application/json", [(wait_s, json.dumps(value).encode())])


def _logprobs(token: Token, num_top: int, by_id: bool) -> dict[str, Any]:
    def named(word: str) -> str:
        return f"token_id:{token_id(word)}" if by_id else word

    top = [{"token": named(word), "logprob": value} for word, value in token.top[:num_top]]
    return {"token": named(token.word), "logprob": token.top[0][1], "top_logprobs": top}


def _chat_words(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The words of a chat as the model's template would put them together."""
    text = "\n".join(str(message["content"]) for message in messages)
    return [*SYSTEM_WORDS, *text.split(), "<assistant>"]


def _prompt_words(prompt: str | Sequence[int]) -> list[str]:
    return prompt.split() if isinstance(prompt, str) else [f"<{number}>" for number in prompt]


def _as_text_chunks(chunks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same stream in the form of /v1/completions."""
    return [
        {
            **chunk,
            "object": "text_completion",
            "choices": [
                {"index": 0, "text": c["delta"]["content"], "finish_reason": c["finish_reason"]}
                for c in chunk["choices"]
            ],
        }
        for chunk in chunks
    ]


def _merge_chunks(
    chunks: Sequence[Mapping[str, Any]], model: str, *, is_chat: bool
) -> dict[str, Any]:
    """The whole form of a streamed answer."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    logprobs = [item for c in choices for item in (c.get("logprobs") or {}).get("content", ())]
    text = "".join(c["delta"]["content"] for c in choices)
    choice: dict[str, Any] = {"index": 0, "finish_reason": choices[-1]["finish_reason"]}
    if is_chat:
        choice["message"] = {"role": "assistant", "content": text}
        choice["logprobs"] = {"content": logprobs} if logprobs else None
    else:
        choice["text"] = text
    merged: dict[str, Any] = {
        "id": chunks[0]["id"],
        "object": "chat.completion" if is_chat else "text_completion",
        "model": model,
        "choices": [choice],
        "usage": chunks[-1].get("usage"),
    }
    if "prompt_token_ids" in chunks[0]:
        merged["prompt_token_ids"] = chunks[0]["prompt_token_ids"]
    return merged


# --- HTTP with a socket ------------------------------------------------------------------------


def make_app(engine: FakeEngine) -> web.Application:
    """An aiohttp application around an engine."""

    async def answer(request: web.Request) -> web.StreamResponse:
        reply = engine.handle(request.method, request.path, await request.read())
        response = web.StreamResponse(
            status=reply.status, headers={"Content-Type": reply.content_type}
        )
        await response.prepare(request)
        for wait_s, piece in reply.pieces:
            if wait_s:
                await asyncio.sleep(wait_s)
            await response.write(piece)
        await response.write_eof()
        return response

    app = web.Application(client_max_size=64 << 20)
    app.router.add_route("*", "/{path:.*}", answer)
    return app


async def serve(engine: FakeEngine, *, port: int = 0) -> tuple[web.AppRunner, str]:
    """Serve an engine on 127.0.0.1; the caller awaits ``runner.cleanup()`` at the end.

    Returns:
        The runner and the address with the port that was bound.
    """
    runner = web.AppRunner(make_app(engine))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    host, bound = runner.addresses[0][:2]
    return runner, f"http://{host}:{bound}"


async def _serve_until_told(engines: Sequence[FakeEngine], port: int) -> None:
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    async with AsyncExitStack() as stack:
        urls = []
        for i, engine in enumerate(engines):
            runner, url = await serve(engine, port=port + i if port else 0)
            stack.push_async_callback(runner.cleanup)
            urls.append(url)
        click.echo(json.dumps({"event": "ready", "url": urls[0], "urls": urls}))
        await told.wait()


@click.command()
@click.option("--port", default=0, show_default=True, help="Of the first engine; 0: free ones.")
@click.option("--num-engines", default=1, show_default=True, help="Engines that share a store.")
@click.option("--alone", is_flag=True, help="No outside store: engines without kvkeep.")
@click.option("--num-blocks", default=10_000, show_default=True, help="Size of an own cache.")
@click.option("--fault", "faults", multiple=True, metavar="NAME=N", help="See fake_kv.Faults.")
def main(
    port: int, num_engines: int, alone: bool, num_blocks: int, faults: tuple[str, ...]
) -> None:
    """Serve fake engines until SIGTERM; prints one JSON line when they are ready."""
    planted: dict[str, Any] = {
        name: int(value) for name, value in (fault.split("=") for fault in faults)
    }
    store = None if alone else FakeStore()
    engines = [
        FakeEngine(store=store, num_blocks=num_blocks, faults=Faults(**planted))
        for _ in range(num_engines)
    ]
    asyncio.run(_serve_until_told(engines, port))


if __name__ == "__main__":
    main()
