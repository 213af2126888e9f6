"""Requests in every form of OpenAI's interface, whole and streamed, with the answer as it came."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvkeep.model.errors import UnavailableError
from kvkeep.validate.load import Endpoint, Sampling

ERROR_CHARS_MAX = 400


@dataclass(frozen=True, slots=True)
class Form:
    """One way to ask."""

    is_chat: bool = True
    is_streamed: bool = False

    @property
    def path(self) -> str:
        """Where it is asked."""
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"

    @property
    def name(self) -> str:
        """For reports."""
        return f"{'chat' if self.is_chat else 'completion'}{', streamed' * self.is_streamed}"


FORMS = tuple(
    Form(is_chat, is_streamed) for is_chat in (True, False) for is_streamed in (False, True)
)


@dataclass(slots=True)
class Said:
    """What a server said, in whichever form."""

    status: int
    text: str = ""
    finish_reason: str | None = None
    model: str | None = None
    response_id: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    num_events: int = 0
    """Events of a stream that carried text."""
    ended: bool = True
    """False for a stream without its last line."""
    error: str | None = None
    retry_after: str | None = None
    """When a server that refuses would take it, as it says."""
    ttft_s: float | None = None
    total_s: float = 0.0

    @property
    def defect(self) -> str | None:
        """Why it is no answer, or None."""
        if self.error is not None or self.status != 200:
            return f"HTTP {self.status}: {self.error}"
        missing = [
            name
            for name, is_there in (
                ("id", bool(self.response_id)),
                ("model", bool(self.model)),
                ("text", bool(self.text)),
                ("finish_reason", bool(self.finish_reason)),
                ("usage", bool(self.usage.get("prompt_tokens"))),
                ("[DONE]", self.ended),
            )
            if not is_there
        ]
        return f"The response has no {', no '.join(missing)}." if missing else None


async def ask(
    endpoint: Endpoint,
    text: str,
    sampling: Sampling,
    form: Form,
    *,
    salt: str | None = None,
    more: Mapping[str, Any] | None = None,
) -> Said:
    """Ask once; whatever goes wrong is in the result.

    Args:
        endpoint: A probed server.
        text: The user's message, or the prompt.
        sampling: Length and seed.
        form: How it is asked.
        salt: ``cache_salt``.
        more: Fields of the body that are set last.
    """
    body: dict[str, Any] = {
        "model": endpoint.model,
        "max_tokens": sampling.max_tokens,
        "temperature": 0,
        "seed": sampling.seed,
    }
    body |= {"messages": [{"role": "user", "content": text}]} if form.is_chat else {"prompt": text}
    if salt is not None and endpoint.dialect.cache_salt:
        body["cache_salt"] = salt
    if form.is_streamed:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    body |= more or {}
    began_s = time.perf_counter()
    try:
        response = await endpoint.post_json(form.path, body)
    except UnavailableError as error:
        return Said(0, error=str(error))
    said = Said(
        response.status_code,
        retry_after=response.headers.get("Retry-After"),
        total_s=time.perf_counter() - began_s,
    )
    if response.status_code != 200:
        said.error = response.text[:ERROR_CHARS_MAX]
        return said
    try:
        if form.is_streamed:
            _take_stream(said, response.text, form)
        else:
            _take(said, response.json(), form)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        said.error = f"The response can't be read: {error}"
    return said


def _take_stream(said: Said, text: str, form: Form) -> None:
    said.ended = False
    for line in text.splitlines():
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            said.ended = True
            return
        chunk = json.loads(data)
        if "error" in chunk:
            said.error = json.dumps(chunk["error"])
            return
        _take(said, chunk, form)


def _take(said: Said, chunk: Mapping[str, Any], form: Form) -> None:
    said.response_id = chunk.get("id") or said.response_id
    said.model = chunk.get("model") or said.model
    said.usage = chunk.get("usage") or said.usage
    for choice in chunk.get("choices") or ():
        part = (choice.get("delta") or choice.get("message") or {}) if form.is_chat else choice
        piece = (part.get("content") if form.is_chat else part.get("text")) or ""
        said.text += piece
        said.num_events += bool(piece)
        said.finish_reason = choice.get("finish_reason") or said.finish_reason
