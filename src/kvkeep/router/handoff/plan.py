"""Whether a request is handed off; pure.

Only what one prefill engine can compute, and one decode engine can take over, is: one prompt, one
answer to it, nothing asked about the prompt itself.
"""

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


def why_not_possible(body: JsonObject, settings: HandOffSettings) -> str:
    """Why a request can't be handed off: a key of ``SKIPS``, or empty if it can.

    Raises:
        PlanError: It may not be served at all.
    """
    if _value(body, PARAMS) is not None:
        if settings.client_params == "refuse":
            raise PlanError(f"{PARAMS} is set by this router: leave it out")
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
