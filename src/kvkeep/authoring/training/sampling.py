"""Continues several prompts at once behind one prefix."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvkeep.authoring.training.forward import Layers, cache_for


@dataclass(frozen=True)
class Draw:
    """How tokens are chosen."""

    temperature: float
    """0: the likeliest one each time."""
    seed: int
    end_ids: frozenset[int]
    """Tokens that end a continuation; they are not part of it."""


def sample(
    model: Any,
    layers: Layers,
    prompts: Sequence[Sequence[int]],
    *,
    tokens_max: int,
    draw: Draw,
    check: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Continue each prompt; the same for the same seed on the same machine.

    Args:
        model: Of transformers.
        layers: The prefix.
        prompts: Token ids behind the prefix, none of them empty.
        tokens_max: Of a continuation.
        draw: How tokens are chosen.
        check: Called before each token; what it raises ends it all.
    """
    drawn: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    if not prompts:
        return drawn
    generator = torch.Generator().manual_seed(draw.seed)
    ids, mask, positions = _left_padded(prompts, layers[0][0].shape[2])
    cache = cache_for(layers, len(prompts), model.dtype)
    for _ in range(tokens_max):
        check()
        with torch.no_grad():
            logits = model(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                position_ids=positions.to(model.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        chosen = _chosen(logits.float().cpu(), draw.temperature, generator)
        for row_idx in sorted(open_rows):
            token_id = int(chosen[row_idx])
            if token_id in draw.end_ids:
                open_rows.discard(row_idx)
            else:
                drawn[row_idx].append(token_id)
        if not open_rows:
            break
        ids = chosen[:, None]
        mask = torch.cat((mask, torch.ones_like(ids)), dim=1)
        positions = positions[:, -1:] + 1
    return drawn


def _chosen(logits: Any, temperature: float, generator: Any) -> Any:
    if temperature == 0:
        return logits.argmax(dim=-1)
    shares = torch.softmax(logits / temperature, dim=-1)
    return torch.multinomial(shares, 1, generator=generator)[:, 0]


def _left_padded(prompts: Sequence[Sequence[int]], prefix_tokens: int) -> tuple[Any, Any, Any]:
    """Ids, mask over prefix and ids, and positions; every row ends with its prompt's last token."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    seen = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row_idx, prompt in enumerate(prompts):
        ids[row_idx, longest - len(prompt) :] = torch.tensor(prompt)
        seen[row_idx, longest - len(prompt) :] = 1
    prefix = torch.ones(len(prompts), prefix_tokens, dtype=torch.long)
    positions = prefix_tokens + (seen.cumsum(dim=1) - 1).clamp(min=0)
    return ids, torch.cat((prefix, seen), dim=1), positions
