"""An engine without a model: an OpenAI-compatible server with a believable prefix cache.

It tokenizes by words, keeps "KV" blocks in an own prefix cache, stores and loads them through an
optional outside store, counts like vLLM and answers from the KV it ended up with. The KV carries
the words it was computed from, so a wrong block shows in the answer the way it would in a model:
a flipped bit changes the tokens, a swapped block makes it say another passage's code word.

`FakeEngine.handle` is pure request to reply and needs no socket (`kvkeep.testing.fake_transport`
wraps it for httpx); `serve` puts it behind aiohttp; ``python -m kvkeep.testing.fake_engine`` runs
it as a process that prints one JSON line when it is ready.
"""

import asyncio
import hashlib
import itertools
import json
import re
import signal
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
from aiohttp import web

SYSTEM_WORDS = ("<system>", "You", "are", "a", "helpful", "assistant.", "<user>")
SECRET = re.compile(r"code word of this passage is (\S+?)\.(?:\s|$)")
_COMMON_WORDS = (
    "the and of to in a that is was he for it with as his on be at by had not are but from or "
    "have an they which one you were her all she there would their we him been has when who will "
    "more no if out so said what up its about into than them can only other new some could time"
)
VOCABULARY = tuple(_COMMON_WORDS.split())
SECRET_WORD = re.compile(r"[a-z]+-[a-z]+-\d+\.?$")
NUM_ALTERNATIVES = 20


@dataclass(frozen=True, slots=True)
class KvBlock:
    """The KV of one block: what it was computed from, and bits that depend on all before it."""

    words: tuple[str, ...]
    bits: bytes


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong; every count is of requests or blocks, 0 for never."""

    flip_every: int = 0
    """Each n-th block loaded from outside has one bit flipped."""
    swap: bool = False
    """A block loaded from outside that holds a code word is replaced by another such block."""
    empty_every: int = 0
    """Each n-th answer is ``[DONE]`` without text and without a finish reason."""
    fail_every: int = 0
    """Each n-th request is answered with HTTP 500."""
    cut_every: int = 0
    """Each n-th stream ends in the middle."""
    reset_lies: bool = False
    """A reset says it succeeded and clears nothing."""
    reset_refusals: int = 0
    """So many resets are refused before one succeeds; -1 refuses always."""
    counters_fall: bool = False
    """The hit counter is set back by a reset."""


class FakeStore:
    """KV outside the engines, with a kvkeep daemon's counters; several engines may share it."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, KvBlock] = {}
        names = "blocks_stored blocks_loaded load_failures device_to_host host_to_device"
        self.counters: dict[str, int] = dict.fromkeys(names.split(), 0)

    def store(self, key: bytes, block: KvBlock) -> None:
        """Keep a block; one that is there already is not counted again."""
        if key not in self.blocks:
            self.blocks[key] = block
            self.counters["blocks_stored"] += 1
            self.counters["device_to_host"] += 1

    def load(self, key: bytes, faults: Faults) -> KvBlock | None:
        """Give a block back, or None; wrong where the faults say so."""
        block = self.blocks.get(key)
        if block is None:
            return None
        self.counters["blocks_loaded"] += 1
        self.counters["host_to_device"] += 1
        count = self.counters["blocks_loaded"]
        if faults.flip_every and count % faults.flip_every == 0:
            return KvBlock(block.words, bytes([block.bits[0] ^ 1]) + block.bits[1:])
        if faults.swap and _has_secret(block):
            others = (b for b in self.blocks.values() if b.words != block.words)
            return next((b for b in others if _has_secret(b)), block)
        return block


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token with its alternatives, best first."""

    word: str
    top: tuple[tuple[str, float], ...]


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


def token_id(word: str) -> int:
    """The id of a word."""
    return zlib.crc32(word.encode()) % 49_152


class FakeEngine:
    """One engine: prefix cache, counters and answers, without a socket."""

    def __init__(
        self,
        *,
        store: FakeStore | None = None,
        model: str = "fake-model",
        block_tokens: int = 16,
        num_blocks: int = 10_000,
        reuse_noise_nats: float = 0.0,
        faults: Faults | None = None,
        timing: Timing | None = None,
    ) -> None:
        """Start empty.

        Args:
            store: Where blocks go and come from; None is an engine alone.
            model: Name it serves.
            block_tokens: Words per block.
            num_blocks: Size of its own cache; the least recently used block goes first.
            reuse_noise_nats: How far reused KV moves logprobs, as another order of additions does.
            faults: What goes wrong.
            timing: How slow it is.
        """
        self.model, self.block_tokens, self.num_blocks = model, block_tokens, num_blocks
        self.store, self.faults, self.timing = store, faults or Faults(), timing or Timing()
        self.reuse_noise_nats = reuse_noise_nats
        self.cache: OrderedDict[bytes, KvBlock] = OrderedDict()
        names = ("prefix_cache", "external_prefix_cache")
        self.counters = {f"{n}_{what}": 0 for n in names for what in ("queries", "hits")}
        self._num_requests = self._num_resets = 0

    # --- KV ------------------------------------------------------------------------------------

    def prefill(self, words: Sequence[str], salt: str = "") -> tuple[list[KvBlock], int, int]:
        """Bring a prompt's whole blocks together.

        Returns:
            The blocks, tokens found in the own cache, and tokens loaded from outside.
        """
        blocks: list[KvBlock] = []
        n, local, external = self.block_tokens, 0, 0
        key, bits, reusable = salt.encode(), b"", True
        for start in range(0, (len(words) - 1) // n * n, n):
            piece = tuple(words[start : start + n])
            key = hashlib.blake2b(key + "\0".join(piece).encode(), digest_size=16).digest()
            block = self.cache.get(key) if reusable and not external else None
            if block is not None:
                local += n
                self.cache.move_to_end(key)
            elif reusable and self.store and (block := self.store.load(key, self.faults)):
                external += n
            if block is None:
                reusable = False
                digest = hashlib.blake2b(bits + "\0".join(piece).encode(), digest_size=8)
                block = KvBlock(piece, digest.digest())
            self._keep(key, block)
            blocks.append(block)
            bits = block.bits
        self.counters["prefix_cache_queries"] += len(words)
        self.counters["prefix_cache_hits"] += local
        if self.store is not None:
            self.counters["external_prefix_cache_queries"] += len(words) - local
            self.counters["external_prefix_cache_hits"] += external
        return blocks, local, external

    def _keep(self, key: bytes, block: KvBlock) -> None:
        self.cache[key] = block
        if self.store is not None:
            self.store.store(key, block)
        while len(self.cache) > self.num_blocks:
            self.cache.popitem(last=False)

    def generate(
        self, words: Sequence[str], blocks: Sequence[KvBlock], max_tokens: int, *, reused: bool
    ) -> Iterator[Token]:
        """Answer from KV: the code word it holds, then words that follow from its bits."""
        tail = words[len(blocks) * self.block_tokens :]
        seen = " ".join([*itertools.chain.from_iterable(b.words for b in blocks), *tail])
        state = hashlib.blake2b(b"".join(b.bits for b in blocks) + " ".join(tail).encode())
        found = SECRET.search(seen)
        said = ["The", "code", "word", "is", f"{found.group(1)}."] if found else []
        for position in range(max_tokens):
            step = state.copy()
            step.update(position.to_bytes(4, "little"))
            token = self._choose(step.digest(), said[position : position + 1], reused)
            state.update(token.word.encode())
            yield token

    def _choose(self, digest: bytes, forced: Sequence[str], reused: bool) -> Token:
        """Rank words by the state's bits; reuse moves each of them a little."""
        start = digest[0] % len(VOCABULARY)
        ranked = [
            VOCABULARY[(start + i) % len(VOCABULARY)]
            for i in range(min(NUM_ALTERNATIVES, len(VOCABULARY)))
        ]
        logprobs = [-0.4 - 0.9 * i for i in range(len(ranked))]
        # One position in eight is a near-tie between the two best words.
        logprobs[1] = logprobs[0] - (0.02 if digest[1] % 8 == 0 else 0.5 + digest[2] / 256)
        if forced:
            ranked, logprobs = [*forced, *ranked[1:]], [-0.01, *(x - 4 for x in logprobs[1:])]
        if reused and self.reuse_noise_nats:
            logprobs = [
                x + self.reuse_noise_nats * (digest[3 + i] / 127.5 - 1)
                for i, x in enumerate(logprobs)
            ]
        top = sorted(zip(ranked, logprobs, strict=True), key=lambda pair: -pair[1])
        return Token(top[0][0], tuple(top))

    # --- HTTP without a socket -----------------------------------------------------------------

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
        if (method, path) == ("POST", "/v1/chat/completions"):
            return self._chat(body)
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

    def _chat(self, body: bytes) -> Reply:
        try:
            asked = json.loads(body)
            text = "\n".join(str(message["content"]) for message in asked["messages"])
        except (ValueError, KeyError, TypeError) as error:
            return _json({"error": {"message": f"bad request: {error}"}}, 400)
        if asked.get("model") not in (None, self.model):
            return _json({"error": {"message": f"no model {asked['model']}"}}, 404)
        self._num_requests += 1
        if _hits(self._num_requests, self.faults.fail_every):
            return _json({"error": {"message": "planted failure"}}, 500)
        words = [*SYSTEM_WORDS, *text.split(), "<assistant>"]
        blocks, local, external = self.prefill(words, str(asked.get("cache_salt") or ""))
        max_tokens = int(asked.get("max_tokens") or 16)
        tokens = list(self.generate(words, blocks, max_tokens, reused=local + external > 0))
        timing = self.timing
        computed = len(words) - local - external
        wait_s = timing.prefill_s_per_token * computed + timing.load_s_per_token * external
        chunks = self._chunks(asked, words, tokens, local + external)
        if not asked.get("stream"):
            whole = _merge_chunks(chunks, self.model)
            return _json(whole, wait_s=wait_s + timing.decode_s_per_token * len(tokens))
        return self._stream(chunks, wait_s)

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


def _has_secret(block: KvBlock) -> bool:
    return any(SECRET_WORD.match(word) for word in block.words)


def _hits(count: int, every: int) -> bool:
    return bool(every) and count % every == 0


def _json(value: Mapping[str, Any], status: int = 200, *, wait_s: float = 0.0) -> Reply:
    return Reply(status, "application/json", [(wait_s, json.dumps(value).encode())])


def _logprobs(token: Token, num_top: int, by_id: bool) -> dict[str, Any]:
    def named(word: str) -> str:
        return f"token_id:{token_id(word)}" if by_id else word

    top = [{"token": named(word), "logprob": value} for word, value in token.top[:num_top]]
    return {"token": named(token.word), "logprob": token.top[0][1], "top_logprobs": top}


def _merge_chunks(chunks: Sequence[Mapping[str, Any]], model: str) -> dict[str, Any]:
    """The whole form of a streamed answer."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    logprobs = [item for c in choices for item in (c.get("logprobs") or {}).get("content", ())]
    message = {"role": "assistant", "content": "".join(c["delta"]["content"] for c in choices)}
    merged: dict[str, Any] = {
        "id": chunks[0]["id"],
        "object": "chat.completion",
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": message,
                "logprobs": {"content": logprobs} if logprobs else None,
                "finish_reason": choices[-1]["finish_reason"] if choices else "length",
            }
        ],
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


async def _serve_until_told(engine: FakeEngine, port: int) -> None:
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    runner, url = await serve(engine, port=port)
    click.echo(json.dumps({"event": "ready", "url": url}))
    await told.wait()
    await runner.cleanup()


@click.command()
@click.option("--port", default=0, show_default=True, help="0 takes a free one.")
@click.option("--alone", is_flag=True, help="No outside store: an engine without kvkeep.")
@click.option("--num-blocks", default=10_000, show_default=True, help="Size of its own cache.")
@click.option("--fault", "faults", multiple=True, metavar="NAME=N", help="See Faults.")
def main(port: int, alone: bool, num_blocks: int, faults: tuple[str, ...]) -> None:
    """Serve a fake engine until SIGTERM; prints one JSON line when it is ready."""
    planted: dict[str, Any] = {
        name: int(value) for name, value in (fault.split("=") for fault in faults)
    }
    engine = FakeEngine(
        store=None if alone else FakeStore(), num_blocks=num_blocks, faults=Faults(**planted)
    )
    asyncio.run(_serve_until_told(engine, port))


if __name__ == "__main__":
    main()
