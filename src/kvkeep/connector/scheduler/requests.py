"""What the scheduler side knows of live requests, and of copies that are under way for them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvkeep.client.prefixes import PrefixLease, Question
from kvkeep.connector.identity import Unsupported
from kvkeep.connector.lora import Adapters
from kvkeep.connector.scheduler.handoff import Awaited
from kvkeep.model.hashing import BlockHasher
from kvkeep.model.ids import Namespace


@dataclass(slots=True)
class RequestState:
    """What is known of one live request."""

    request: Any
    hasher: BlockHasher
    question: Question | None = None
    lease: PrefixLease | None = None
    is_asked: bool = False
    """The daemon was asked for this turn in the waiting queue."""
    is_allocated: bool = False
    """vLLM gave it blocks since; a further lookup means that it was preempted."""
    may_load: bool = True
    """False after a failed load: what failed once is recomputed, not tried again."""
    num_local_blocks: int = 0
    """Blocks that were in the engine already when it was last looked up."""
    may_store: bool = True
    """False once its block ids or its names are no longer sure."""
    num_stored: int = 0
    """Leading blocks that are in the pool or on their way there."""
    block_ids: list[int] = field(default_factory=list)
    is_offered: bool = False
    """Its blocks are for another engine: all of the prompt's are stored."""
    is_handed: bool = False
    """Another engine computed its prompt: what was stored of it is loaded, whatever that costs."""
    awaited: Awaited | None = None
    """Blocks that may still be on their way from that engine; None when the wait is over."""


@dataclass(frozen=True, slots=True)
class LoadInFlight:
    """A load that the ranks have yet to report."""

    lease: PrefixLease | None
    """None of a load that is bound to fail."""
    namespace: Namespace
    first: int
    """Of the request's blocks, the first that is loaded."""
    num_blocks: int


@dataclass(slots=True)
class StoreInFlight:
    """A store that not every rank has reported."""

    state: RequestState
    first: int
    """Of the request's blocks, the first that is stored."""
    blocks: Sequence[Any]
    """Engine blocks, one reference on each."""
    num_ranks_left: int


def skips_cache(request: Any) -> bool:
    """Whether the request must compute its whole prompt (prompt_logprobs).

    vLLM 0.26 asks connectors all the same; 0.32 does not.
    """
    return bool(getattr(request, "skip_reading_prefix_cache", False))


def find_extras(request: Any, adapters: Adapters) -> dict[str, str]:
    """What besides token ids decides a request's KV.

    Args:
        request: vLLM's.
        adapters: The LoRA adapters known so far, added to.

    Raises:
        Unsupported: Something that can't be named: its KV must neither be loaded nor stored.
    """
    if getattr(request, "prompt_embeds", None) is not None:
        raise Unsupported("prompts given as embeddings have no token ids")
    if getattr(request, "mm_features", None):
        raise Unsupported("media in prompts are not supported yet")
    if getattr(request, "resumable", False):
        # vLLM takes back the last token of such a request when its next piece arrives.
        raise Unsupported("prompts that arrive in pieces are not supported")
    extras = {}
    if request.cache_salt:
        extras["salt"] = str(request.cache_salt)
    if request.lora_request is not None:
        extras["lora"] = adapters.identify(request.lora_request)
    return extras
