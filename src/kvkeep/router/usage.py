"""What a response says of its tokens, found in its last bytes; bodies are not parsed.

``usage`` stands near the end of what OpenAI-compatible engines answer, in whole responses as in the
last event of a stream that was asked for it (``stream_options.include_usage``).
"""

import re
from typing import Final

import msgspec

from kvkeep.router.relay import plain

TAIL_BYTES_MAX: Final = 16 << 10
"""How far from the end it is looked for: what engines put behind it is short."""
OBJECT_BYTES_MAX: Final = 1024
"""Of the object itself."""
_NAME: Final = b'"usage"'
"""In text that a model made, the quotes would be escaped."""
_PROMPT = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*([0-9]{1,12})\b')
_COMPLETION = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*([0-9]{1,12})\b')
_CACHED = re.compile(rb'"cached_tokens"\s*:\s*([0-9]{1,12})\b')


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one request, as its engine counted them."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None
    """Prompt tokens that were not computed; None if the engine does not tell."""


def find_usage(before: bytes, last: bytes) -> Usage | None:
    """What a response's last two pieces say; None if nothing.

    Args:
        before: The piece before the last: what is looked for may be cut by the network.
        last: The last piece.
    """
    tail = last[-TAIL_BYTES_MAX:]
    begin = tail.rfind(_NAME)
    if begin < 0 and before:
        tail = (before + tail)[-TAIL_BYTES_MAX:]
        begin = tail.rfind(_NAME)
    if begin < 0:
        return None
    found = tail[begin : begin + OBJECT_BYTES_MAX]
    find = find_tokens if plain.find_tokens is None else plain.find_tokens
    prompt, completion, cached = find(found)
    if prompt < 0:
        return None
    return Usage(prompt, max(completion, 0), None if cached < 0 else cached)


def find_tokens(found: bytes) -> tuple[int, int, int]:
    """Tokens of prompt, completion and cache, each where it is first said; -1: nowhere."""
    prompt, completion = _PROMPT.search(found), _COMPLETION.search(found)
    cached = _CACHED.search(found)
    return (
        -1 if prompt is None else int(prompt[1]),
        -1 if completion is None else int(completion[1]),
        -1 if cached is None else int(cached[1]),
    )
