"""What a policy may look at of a request."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class RequestView:
    """A request as policies see it; a field nobody needs is not worked out and stays None."""

    path: str
    model: str | None = None
    key: bytes | None = None
    """What keeps requests together: docs/routing.md has the order in which it is looked for."""
    prefix: Sequence[int] | None = None
    """64-bit hashes of the prompt's blocks of tokens or text, chained, first to last."""
    num_tokens: int | None = None
    """Tokens of the prompt, an estimate where it was not tokenized."""
    is_stream: bool | None = None
