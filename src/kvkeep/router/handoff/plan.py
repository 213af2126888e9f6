"""Whether a request is handed off; pure.

Only what one prefill engine can compute, and one decode engine can take over, is: one prompt, one
answer to it, nothing asked about the prompt itself.
"""

import re
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from kvkeep.router.handoff.settings import HandOffSettings
from kvkeep.router.handoff.splice import JsonObject

PATHS: Final = frozenset({b"/v1/completions", b"/v1/chat/completions"})
PARAMS: Final = "kv_transfer_params"
SKIPS: Final = {
    "path": "requests that generate nothing, or in a form that is not handed off",
    "size": "bodies too large to be gathered (relay.gathered_bytes_max)",
    "batch": "requests with several prompts, or with embeddings as prompt",
    "samples": "requests for several answers, or for a search among them",
    "prompt": "requests that want the prompt back, or its log probabilities",
    "client_params": "requests that brought kv_transfer_params, where that is allowed",
    "short": "prompts of less than min_tokens",
    "warm": "prompts of which a decode engine has all but less than min_tokens",
}
"""Reason to help text: what goes to a decode engine as it came."""
_SAMPLES: Final = ("n", "best_of")
_SEARCHES: Final = ("use_beam_search",)


BYTES_PER_TOKEN: Final = 4
"""Of text, roughly."""
BYTES_PER_MESSAGE: Final = 32
"""What JSON adds to a message's text, roughly."""


# The name, or a letter of it that JSON spells by its number.
_SPELT: Final = re.compile(rb"kv_transfer_params|\\u00(?:5[fF]|6[1356bBdDeE]|7[02346])")
_SPELT_BYTES_MAX: Final = len(PARAMS)
_REFUSED: Final = f"{PARAMS} is set by this router: leave it out"


class PlanError(Exception):
    """A request that is refused with 400; the text says why."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a request's work."""

    num_tokens: int
    """Of the prompt, an estimate."""
    num_uncached: int
    """Of these, what the decode engine that would be chosen has to compute."""


def estimate_tokens(body: JsonObject) -> int:
    """Tokens of the prompt: of ids exactly so many, of text a guess."""
    prompt, messages = body.find("prompt"), body.find("messages")
    if prompt is not None:
        if prompt[:1] == b"[" and b'"' not in prompt:
            return prompt.count(b",") + 1
        return len(prompt) // BYTES_PER_TOKEN
    if messages is None:
        return 0
    overhead = BYTES_PER_MESSAGE * messages.count(b'"role"')
    tools = body.find("tools") or b""
    return max(0, len(messages) - overhead + len(tools)) // BYTES_PER_TOKEN


def why_not_worth(facts: Facts, settings: HandOffSettings) -> str:
    """Why handing off would not pay: a key of ``SKIPS``, or empty if it does."""
    if facts.num_tokens < settings.min_tokens:
        return "short"
    return "warm" if facts.num_uncached < settings.min_tokens else ""


def refuse_params(body: bytes) -> None:
    """Look for the parameters in a whole body of any form, at any depth.

    Raises:
        PlanError: They are there; or might be, in a body that can't be read as JSON in UTF-8.
    """
    if not _is_spelt(body):
        return
    try:
        is_named = _is_named(msgspec.json.decode(body))
    except (msgspec.DecodeError, ValueError, RecursionError):
        is_named = True
    if is_named:
        raise PlanError(_REFUSED)


class ParamsGuard:
    """Looks for the parameters in a body that comes in pieces, and is not kept.

    It can't tell a name from a text that spells it: both are refused.
    """

    __slots__ = ("_last",)

    def __init__(self) -> None:
        """Have seen nothing."""
        self._last = b""

    def take(self, piece: bytes) -> None:
        """Look at the next piece.

        Raises:
            PlanError: The name of the parameters is there.
        """
        seen = self._last + piece.replace(b"\0", b"")
        if _is_spelt(seen):
            raise PlanError(_REFUSED)
        self._last = seen[-_SPELT_BYTES_MAX:]


def _is_spelt(body: bytes) -> bool:
    # Parsers take UTF-16 and UTF-32 for JSON as well: every other byte of the name is zero there.
    return _SPELT.search(body.replace(b"\0", b"")) is not None


def _is_named(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get(PARAMS) is not None or any(map(_is_named, value.values()))
    return isinstance(value, list) and any(map(_is_named, value))


def why_not_possible(body: JsonObject, settings: HandOffSettings) -> str:
    """Why a request can't be handed off: a key of ``SKIPS``, or empty if it can.

    Raises:
        PlanError: It may not be served at all.
    """
    if _value(body, PARAMS) is not None:
        if settings.client_params == "refuse":
            raise PlanError(_REFUSED)
        return "client_params"
    if _is_batch(_value(body, "prompt")) or _value(body, "prompt_embeds") is not None:
        return "batch"
    if any(_value(body, name) not in (None, 1) for name in _SAMPLES):
        return "samples"
    if any(_value(body, name) for name in _SEARCHES):
        return "samples"
    if _value(body, "echo") not in (None, False) or _value(body, "prompt_logprobs") is not None:
        return "prompt"
    return ""


def _is_batch(prompt: Any) -> bool:
    """Whether it is more than one text, or one list of token ids."""
    if not isinstance(prompt, list):
        return False
    return len(prompt) > 1 and not isinstance(prompt[0], int)


def _value(body: JsonObject, name: str) -> Any:
    raw = body.find(name)
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw)
    except msgspec.DecodeError:
        return raw  # a number beyond any type: nothing that is looked for here
