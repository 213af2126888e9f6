"""Sends prompts to an OpenAI-compatible server and keeps what came back.

Async, over one httpx client; nothing here judges. A request never raises for what the server did:
whatever goes wrong becomes `Answer.error`, because a failed request is a result of the run.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import httpx

from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.validate.answer import Answer, TokenStep
from kvkeep.validate.subjects.hooks import Hooks

TOP_LOGPROBS = 5
"""Alternatives asked per position; vLLM allows 20 at most by default (``--max-logprobs``)."""
ERROR_CHARS_MAX = 400
"""How much of a server's error body goes into a report."""
RESET_ATTEMPTS_MAX = 60
RESET_PAUSE_S = 0.25
"""vLLM refuses to reset while stores still hold blocks; 15 s covers the slowest tier seen."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are generated; temperature is 0 always."""

    max_tokens: int = 48
    seed: int = 42

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InputError(f"Give max-tokens of at least 1, not {self.max_tokens}.")


@dataclass(frozen=True, slots=True)
class Dialect:
    """Which of vLLM's extras this server understands (`kvkeep.validate.capability` finds out)."""

    logprobs: bool = True
    token_ids: bool = True
    """``return_tokens_as_token_ids`` and ``return_token_ids``."""
    cache_salt: bool = True
    usage_in_stream: bool = True


@dataclass(frozen=True, slots=True)
class ResetReport:
    """What a reset of an engine's prefix cache did, as far as the engine says."""

    ok: bool
    attempts: int
    took_s: float
    detail: str
    cleared: Mapping[str, str] = field(default_factory=dict)
    """Per tier, what was cleared: ``engine``, ``external``."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "ok": self.ok,
            "attempts": self.attempts,
            "took_s": self.took_s,
            "detail": self.detail,
            "cleared": dict(self.cleared),
        }


class Endpoint:
    """One engine's HTTP address; an async context manager that owns its connections."""

    def __init__(
        self,
        url: str,
        *,
        name: str = "engine",
        model: str | None = None,
        timeout_s: float = 30.0,
        dialect: Dialect | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Describe an endpoint; nothing is sent.

        Args:
            url: ``http://host:port``, with or without a trailing ``/v1``.
            name: Its name in reports.
            model: Model to ask for; None takes the first the server lists.
            timeout_s: Longest wait for any one read of a response.
            dialect: Extras to use; the default is all of vLLM's.
            transport: A replacement for the network, for tests.
        """
        self.url = _checked_url(url)
        self.name = name
        self.model = model
        self.timeout_s = timeout_s
        self.dialect = dialect or Dialect()
        self.hooks = Hooks()
        """How it is reset, and where it counts."""
        self.patience = 1.0
        """Times ``timeout_s`` that an answer's pieces may take: more where many wait at once."""
        # Engines are near; a proxy of the environment would only stand between.
        self._client = httpx.AsyncClient(
            base_url=self.url,
            timeout=httpx.Timeout(timeout_s),
            transport=transport,
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def get_text(self, path: str) -> str:
        """Body of a GET of a path, or of another server's whole address.

        Raises:
            UnavailableError: No 2xx answer came.
        """
        try:
            response = await self._client.get(path)
            response.raise_for_status()
        except httpx.HTTPError as error:
            raise UnavailableError(f"GET {self._whole(path)} failed: {_named(error)}.") from error
        return response.text

    def _whole(self, path: str) -> str:
        """An address of another server stands as it is, as it does for the client."""
        return path if "://" in path else f"{self.url}{path}"

    async def get_json(self, path: str) -> Any:
        """Decoded body of a GET.

        Raises:
            UnavailableError: No 2xx answer came, or it was not JSON.
        """
        text = await self.get_text(path)
        try:
            return json.loads(text)
        except ValueError as error:
            raise UnavailableError(f"GET {self.url}{path} did not answer JSON.") from error

    async def post_json(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        method: str = "POST",
    ) -> httpx.Response:
        """POST, or another method, and return the response whatever its status.

        Raises:
            UnavailableError: The server can't be reached or broke off.
        """
        try:
            return await self._client.request(
                method, path, json=body, headers=headers, timeout=self.timeout_s * self.patience
            )
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"{method} {self._whole(path)} failed: {_named(error)}."
            ) from error

    async def chat(self, text: str, sampling: Sampling, *, salt: str | None = None) -> Answer:
        """Ask one question through ``/v1/chat/completions``, streamed.

        Args:
            text: The user's message.
            sampling: Length and seed.
            salt: ``cache_salt``: requests with different salts share no KV.

        Returns:
            The answer. If anything went wrong its ``error`` says what, and the rest of it is what
            had arrived until then.
        """
        collector = _Collector()
        began_s = time.perf_counter()
        try:
            timeout_s = self.timeout_s * self.patience
            async with asyncio.timeout(timeout_s * 4 + sampling.max_tokens):
                body = self._body(text, sampling, salt)
                async with self._client.stream(
                    "POST", "/v1/chat/completions", json=body, timeout=timeout_s
                ) as got:
                    if got.status_code != httpx.codes.OK:
                        await got.aread()
                        collector.error = f"HTTP {got.status_code}: {got.text[:ERROR_CHARS_MAX]}"
                    else:
                        await collector.read(got, began_s)
        except TimeoutError:
            collector.error = "The answer did not end in time."
        except httpx.HTTPError as error:
            collector.error = f"{_named(error)}."
        return replace(collector.answer(), total_s=time.perf_counter() - began_s)

    def _body(self, text: str, sampling: Sampling, salt: str | None) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": sampling.max_tokens,
            "temperature": 0,
            "seed": sampling.seed,
            "stream": True,
        }
        if self.dialect.usage_in_stream:
            body["stream_options"] = {"include_usage": True}
        if self.dialect.logprobs:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if self.dialect.token_ids:
            body |= {"return_tokens_as_token_ids": True, "return_token_ids": True}
        if salt is not None and self.dialect.cache_salt:
            body["cache_salt"] = salt
        return body

    async def reset_prefix_cache(self) -> ResetReport:
        """Empty the engine's own prefix cache; what lies outside it stays.

        Tried again while the engine says no, because blocks that are still being stored can't be
        dropped. The report is not ok if the engine never agreed; whether it told the truth shows
        in the replay (`kvkeep.validate.runner`).
        """
        began_s = time.perf_counter()
        ok, detail, attempts = False, "", 0
        for attempts in range(1, RESET_ATTEMPTS_MAX + 1):  # noqa: B007 - reported below
            ok, detail, final = await self._reset_once()
            if ok or final:
                break
            await asyncio.sleep(RESET_PAUSE_S)
        return ResetReport(
            ok=ok,
            attempts=attempts,
            took_s=time.perf_counter() - began_s,
            detail=detail,
            cleared={"engine": "all blocks" if ok else "nothing", "external": "nothing, as asked"},
        )

    async def _reset_once(self) -> tuple[bool, str, bool]:
        """Return (agreed, what it said, trying again is pointless)."""
        hook = self.hooks.reset
        if not hook.is_possible:
            return False, f"{hook.otherwise}.", True
        try:
            response = await self.post_json(hook.address, method=hook.method)
        except UnavailableError as error:
            return False, str(error), True
        if response.status_code == httpx.codes.NOT_FOUND:
            return (
                False,
                f"The server has no {hook.address}: {hook.otherwise}.",
                True,
            )
        if not response.is_success:
            return False, f"HTTP {response.status_code}: {response.text[:ERROR_CHARS_MAX]}", False
        if not response.content:
            return True, f"HTTP {response.status_code} without a body", True
        try:
            said = response.json()
        except ValueError:
            return True, f"HTTP {response.status_code}: {response.text[:ERROR_CHARS_MAX]}", True
        agreed = not isinstance(said, dict) or bool(said.get("success", True))
        return agreed, json.dumps(said)[:ERROR_CHARS_MAX], agreed


class _Collector:
    """Puts the chunks of one stream together."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.steps: list[TokenStep] = []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.prompt_ids: tuple[int, ...] | None = None
        self.usage: Mapping[str, Any] = {}
        self.ttft_s: float | None = None
        self.done = False

    async def read(self, response: httpx.Response, began_s: float) -> None:
        """Read a stream to its end; malformed chunks become ``error``."""
        async for data in _sse_data(response):
            if data == "[DONE]":
                self.done = True
                break
            try:
                self._take(json.loads(data), began_s)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                self.error = f"A chunk can't be read: {error}: {data[:80]}"
                return
        if self.error is None and not self.done:
            self.error = "The stream broke off before [DONE]."

    def _take(self, chunk: Mapping[str, Any], began_s: float) -> None:
        if "error" in chunk:
            self.error = f"The stream ended in an error: {json.dumps(chunk['error'])}"
            return
        self.usage = chunk.get("usage") or self.usage
        if chunk.get("prompt_token_ids"):
            self.prompt_ids = tuple(chunk["prompt_token_ids"])
        for choice in chunk.get("choices") or ():
            content = (choice.get("delta") or {}).get("content") or ""
            steps = [_step(item) for item in (choice.get("logprobs") or {}).get("content") or ()]
            if self.ttft_s is None and (content or steps):
                self.ttft_s = time.perf_counter() - began_s
            self.text.append(content)
            self.steps += steps
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def answer(self) -> Answer:
        details = self.usage.get("prompt_tokens_details") or {}
        return Answer(
            text="".join(self.text),
            steps=tuple(self.steps),
            finish_reason=self.finish_reason,
            error=self.error,
            prompt_token_ids=self.prompt_ids,
            prompt_tokens=self.usage.get("prompt_tokens"),
            cached_tokens=details.get("cached_tokens"),
            ttft_s=self.ttft_s,
        )


def _step(item: Mapping[str, Any]) -> TokenStep:
    top = [(str(entry["token"]), float(entry["logprob"])) for entry in item["top_logprobs"]]
    # Servers agree on "best first" only mostly; a stable sort keeps their order among equals.
    top.sort(key=lambda pair: -pair[1])
    return TokenStep(str(item["token"]), float(item["logprob"]), tuple(top))


async def _sse_data(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            yield line[5:].strip()


def _checked_url(url: str) -> str:
    parsed = httpx.URL(url if "://" in url else f"http://{url}")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError(f"{url!r} is no address: give one like http://127.0.0.1:8000.")
    return str(parsed).rstrip("/").removesuffix("/v1")


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
