"""From a request's body to the hashes of its prompt's blocks: of text, or of the engine's tokens.

Approximate, the default: the prompt's text is put into one form and cut into blocks of bytes. It
needs no tokenizer and takes microseconds; events of engines, which speak of tokens, can't be used.

Exact: a thread of its own renders the chat template and tokenizes, as the engine will. Rust does
the work without the interpreter's lock (tokenizers 0.23; earlier ones keep it in ``encode``).
"""

import asyncio
import contextlib
import itertools
import json
import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from kvkeep.model.clock import Clock
from kvkeep.model.errors import InputError
from kvkeep.router.prefix_hashes import (
    TEXT_BLOCK_BYTES,
    salt_key,
    text_hashes,
    token_hashes,
    token_root,
)
from kvkeep.router.request import RequestView

log = logging.getLogger(__name__)

BYTES_PER_TOKEN = 4
"""Of English text; only ratios between endpoints matter."""
TEXT_BLOCK_TOKENS = TEXT_BLOCK_BYTES // BYTES_PER_TOKEN
TEXT_BYTES_MAX = 4 << 20
"""Of a prompt that is looked at; a million tokens."""
WAIT_S = 1.0
"""A prompt that is not tokenized by then is routed without; a knot of long ones must not hold up
what follows. Looked at as often as other time limits."""
WAITING_MAX = 64
"""Prompts that wait for the tokenizer; more are routed by load alone."""


class Prefix(NamedTuple):
    """What ``RequestView`` gets of a prompt."""

    hashes: list[int]
    num_tokens: int


class Message(msgspec.Struct, gc=False):
    """A message of a chat; what else it has is not part of the text."""

    role: str = ""
    content: str | list[Any] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None


class Prompt(msgspec.Struct, gc=False):
    """The fields of a body that make its prompt; everything else is skipped unread."""

    messages: list[Message] | None = None
    tools: msgspec.Raw = msgspec.Raw()
    prompt: str | list[Any] | None = None
    input: str | list[Any] | None = None
    model: str | None = None
    cache_salt: str | None = None


_DECODER = msgspec.json.Decoder(Prompt)


def parse_prompt(body: bytes | memoryview) -> Prompt | None:
    """Read the prompt's fields of a body; None if they are not as they should be."""
    try:
        return _DECODER.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return None


def normalized_text(prompt: Prompt) -> bytes:
    """Return the prompt's text in one form, whatever the order and spacing of the body's fields.

    A conversation's next prompt begins with the one before. What can't be encoded, and what is
    beyond ``TEXT_BYTES_MAX``, is left out.
    """
    parts = [f"\x1d{prompt.cache_salt}"] if prompt.cache_salt else []
    if prompt.messages is not None:
        # Templates put tools before the messages.
        parts.append(bytes(prompt.tools).decode("utf-8", "replace"))
        parts += map(_message_text, prompt.messages)
    else:
        parts.append(_flat(prompt.prompt if prompt.prompt is not None else prompt.input))
    return "".join(parts).encode("utf-8", "replace")[:TEXT_BYTES_MAX]


def _message_text(message: Message) -> str:
    calls = _json(message.tool_calls) if message.tool_calls else ""
    return f"\x1e{message.role}\x1f{_flat(message.content)}{calls}"


def _flat(content: str | list[Any] | None) -> str:
    """Return a content's text, whether it is one text, parts of texts, or ids of tokens."""
    if isinstance(content, str):
        return content
    return "".join(
        part["text"]
        if isinstance(part, dict) and isinstance(part.get("text"), str)
        else _json(part)
        for part in content or ()
    )


def _json(value: Any) -> str:
    # A lone surrogate, which JSON can carry, can't be encoded.
    try:
        return msgspec.json.encode(value, order="sorted").decode()
    except (UnicodeEncodeError, RecursionError):
        return ""


def approximate_prefix(body: bytes | memoryview) -> Prefix | None:
    """Return the prefix of a body by its text; None if it has no prompt that can be read."""
    prompt = parse_prompt(body)
    if prompt is None:
        return None
    text = normalized_text(prompt)
    return Prefix(text_hashes(text), max(1, len(text) // BYTES_PER_TOKEN))


class Encoded(Protocol):
    """A tokenized text."""

    @property
    def ids(self) -> list[int]:
        """The ids of its tokens."""
        ...


class Encodes(Protocol):
    """The one method of ``tokenizers.Tokenizer`` that is used."""

    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> Encoded:
        """Tokenize a text."""
        ...


class Renderer(Protocol):
    """Makes the text that an engine makes of a chat."""

    def __call__(self, messages: list[Any], tools: list[Any] | None, **more: Any) -> str:
        """Return the text, with the opening of the answer unless ``more`` says otherwise.

        Args:
            messages: Of the chat.
            tools: That the model may call.
            more: ``add_generation_prompt``, and what else the request has for the template.

        Raises:
            ValueError: The template refuses these messages.
        """
        ...


class Tokenizing:
    """Tokenizes prompts on a thread of its own, so many at a time and no more.

    ``prefix_of`` may be called from one thread; ``then`` is called from the tokenizer's thread or,
    where nothing has to be tokenized, at once: callers hand over with ``call_soon_threadsafe``.
    """

    def __init__(
        self,
        tokenizer: Encodes,
        block_tokens: int,
        renderer: Renderer | None = None,
        *,
        waiting_max: int = WAITING_MAX,
    ) -> None:
        """Start the thread.

        Args:
            tokenizer: The engine's.
            block_tokens: Tokens per block of the engine.
            renderer: Of chats; without one they have no prefix.
            waiting_max: Prompts that may wait.
        """
        self._tokenizer, self._renderer = tokenizer, renderer
        self._block_tokens, self._waiting_max = block_tokens, waiting_max
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="tokenizing")
        self._waiting: set[Future[Prefix | None]] = set()
        self.num_refused = 0
        """Prompts that were not tokenized because too many waited."""

    def prefix_of(self, body: bytes, then: Callable[[Prefix | None], None]) -> None:
        """Work out the prefix of a body.

        Args:
            body: Of the request.
            then: Called once with the prefix, or with None if there is none, or no room to wait.
        """
        if len(self._waiting) >= self._waiting_max:
            self.num_refused += 1
            then(None)
            return
        future = self._threads.submit(self._work_out, body)
        self._waiting.add(future)

        def done(done_future: Future[Prefix | None]) -> None:
            self._waiting.discard(done_future)
            # Whatever a template or a tokenizer makes of a hostile prompt: it has no prefix then.
            is_failed = done_future.cancelled() or done_future.exception() is not None
            then(None if is_failed else done_future.result())

        future.add_done_callback(done)

    def _work_out(self, body: bytes) -> Prefix | None:
        prompt = parse_prompt(body) if len(body) <= TEXT_BYTES_MAX else None
        ids = None if prompt is None else self.token_ids(prompt, body)
        if prompt is None or ids is None:
            return None
        extra = (salt_key(prompt.cache_salt),) if prompt.cache_salt else ()
        try:
            hashes = token_hashes(ids, self._block_tokens, token_root(), extra)
        except (OverflowError, TypeError):
            return None
        return Prefix(hashes, max(1, len(ids)))

    def token_ids(self, prompt: Prompt, body: bytes) -> Sequence[int] | None:
        """Return the ids that the engine makes of a prompt; None if that can't be said."""
        if prompt.messages is not None:
            return self._chat_ids(body)
        if isinstance(prompt.prompt, str):
            return self._tokenizer.encode(prompt.prompt).ids
        if isinstance(prompt.prompt, list) and all(isinstance(x, int) for x in prompt.prompt):
            return prompt.prompt
        return None

    def _chat_ids(self, body: bytes) -> Sequence[int] | None:
        if self._renderer is None:
            return None
        # The template may look at any field of a message.
        fields = msgspec.json.decode(body)
        try:
            more = dict(fields.get("chat_template_kwargs") or {})
            if "add_generation_prompt" in fields:
                more["add_generation_prompt"] = fields["add_generation_prompt"]
            text = self._renderer(fields["messages"], fields.get("tools"), **more)
        except (ValueError, TypeError, KeyError):
            return None
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def close(self) -> None:
        """Stop; prompts that wait have no prefix."""
        self._threads.shutdown(wait=True, cancel_futures=True)


class _Waiting(NamedTuple):
    view: RequestView
    then: Callable[[], None]
    since_s: float


class Prefixes:
    """Completes views on the event loop's thread, each once and within ``WAIT_S`` or so."""

    def __init__(self, tokenizing: Tokenizing, clock: Clock) -> None:
        self._tokenizing, self._clock = tokenizing, clock
        self._waiting: dict[int, _Waiting] = {}
        self._numbers = itertools.count()
        self._num_late = 0

    @property
    def num_missing(self) -> int:
        """Prompts that were routed by load because tokenizing took or waited too long."""
        return self._num_late + self._tokenizing.num_refused

    def fill(self, body: bytes, view: RequestView, then: Callable[[], None]) -> None:
        """Call ``then`` when the view has its prefix, or will have none; never from in here."""
        loop, number = asyncio.get_running_loop(), next(self._numbers)
        self._waiting[number] = _Waiting(view, then, self._clock.now_s())

        def worked_out(prefix: Prefix | None) -> None:
            # The loop may have ended before the tokenizer's thread.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._done, number, prefix)

        self._tokenizing.prefix_of(body, worked_out)

    def _done(self, number: int, prefix: Prefix | None) -> None:
        waiting = self._waiting.pop(number, None)
        if waiting is None:
            return
        if prefix is not None:
            waiting.view.prefix, waiting.view.num_tokens = prefix
        waiting.then()

    def look(self, now_s: float) -> None:
        """Give up on what took too long; the load decides then."""
        for number, waiting in list(self._waiting.items()):
            if now_s - waiting.since_s < WAIT_S:
                # In the order in which they came.
                return
            self._num_late += 1
            self._done(number, None)


def load_tokenizer(folder: Path) -> tuple[Encodes, Renderer | None]:
    """Load a model's tokenizer, and its chat template if it has one and jinja2 is installed.

    Raises:
        InputError: There is no tokenizer.json in the folder, it can't be read, or the package
            that reads it is missing.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise InputError("exact prefixes need the package tokenizers: install it") from error
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"there is no {path}: give the folder of the model that the engines serve")
    # The library raises bare exceptions for what it can't read, so the plain mistakes come first.
    if not isinstance(_read_json(path).get("model"), dict):
        raise InputError(f"{path} is no tokenizer: copy the model's files anew")
    tokenizer: Encodes = Tokenizer.from_file(str(path))
    return tokenizer, _load_renderer(folder)


def _load_renderer(folder: Path) -> Renderer | None:
    try:
        # Only where chats are tokenized, and no dependency of the rest of the router.
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        return None
    config = _read_json(folder / "tokenizer_config.json")
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if not isinstance(source, str):
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    # Jinja's own escapes what HTML has a meaning for.
    environment.filters["tojson"] = _plain_json
    try:
        template = environment.from_string(source)
    except TemplateError as error:
        log.warning("chats are routed by load: the chat template can't be used. reason=%s", error)
        return None
    takes_parts = _LOOPS_OVER_PARTS.search(source) is not None
    special = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in config.items()
        if name.endswith("_token")
    }

    def render(messages: list[Any], tools: list[Any] | None, **more: Any) -> str:
        if not takes_parts:
            messages = list(map(_with_plain_content, messages))
        try:
            fields = {"add_generation_prompt": True, **special, **more}
            return template.render(**{**fields, "messages": messages, "tools": tools})
        except TemplateError as error:
            raise ValueError(str(error)) from error

    return render


_LOOPS_OVER_PARTS = re.compile(r"""\bin\s+\w+(?:\.content\b|\[['"]content['"]\])""")
"""How a template shows that it takes a content's parts one by one."""


def _with_plain_content(message: Any) -> Any:
    """Put a content's parts together as vLLM does for templates that know texts only."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    # Media have tokens of their own, which nobody here can tell.
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _plain_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> str:
    raise ValueError(message)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError):
        return {}
    return value if isinstance(value, dict) else {}
