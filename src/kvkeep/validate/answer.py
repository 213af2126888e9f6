"""What one request got back: values only, so that verdicts can be judged without a server."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TokenStep:
    """One generated token with the alternatives the engine reported beside it."""

    token: str
    """``token_id:N`` where the server can say ids, else the token's text."""
    logprob: float
    """Natural logarithm of its probability."""
    top: tuple[tuple[str, float], ...] = ()
    """Most likely tokens at this position, best first; empty if the server reports none."""

    @property
    def runner_up(self) -> tuple[str, float] | None:
        """The second best token, or None where fewer than two were reported."""
        return self.top[1] if len(self.top) > 1 else None


@dataclass(frozen=True, slots=True)
class Answer:
    """One completed, failed or missing answer."""

    text: str = ""
    steps: tuple[TokenStep, ...] = ()
    """One per generated token; empty where the server reports no logprobs."""
    finish_reason: str | None = None
    error: str | None = None
    """Why there is no usable answer, in one sentence; None if there is one."""
    prompt_token_ids: tuple[int, ...] | None = None
    """The prompt as the engine tokenized it; None where the server does not say."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    """Prompt tokens the engine did not compute, as it reports them; None where it does not."""
    ttft_s: float | None = None
    """Seconds from sending to the first token."""
    total_s: float | None = None
    """Seconds from sending to the last byte."""

    @property
    def token_ids(self) -> tuple[str, ...] | None:
        """Generated tokens in order, or None where the server reports none."""
        return tuple(step.token for step in self.steps) or None

    def to_dict(self) -> dict[str, Any]:
        """The evidence of a report: what was answered and how fast, without the prompt's ids."""
        return {
            "text": self.text,
            "tokens": list(self.token_ids or ()),
            "finish_reason": self.finish_reason,
            "error": self.error,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "ttft_s": self.ttft_s,
            "total_s": self.total_s,
        }


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a suite."""

    prompt_id: str
    """Unique within a run: ``control-2``, ``window-7``."""
    text: str
    kind: str = "window"
    """``control``, ``window``, ``random``, or a suite's own word."""
    secrets: tuple[str, ...] = ()
    """Code words planted here; in another prompt's answer they are contamination."""
