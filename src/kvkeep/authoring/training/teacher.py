"""What the model expects at every token of a conversation when it has the whole document.

Kept are the likeliest tokens of each place and, as one, all others: the distance between two such
lists is at most the distance between the whole distributions, and a vocabulary has 50,000 tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvkeep.authoring.training.forward import Layers, logits_behind
from kvkeep.authoring.training.self_study import Conversation

LIKELIEST = 64
BATCH = 8
_LEAST = 1e-6
"""Of a share whose logarithm is taken."""


@dataclass(frozen=True)
class Lesson:
    """A conversation, and what is to be expected after each of its tokens but the last."""

    token_ids: list[int]
    num_prompt_tokens: int
    expected_ids: Any
    """``int32 [tokens - 1, LIKELIEST]``."""
    expected_logs: Any
    """Logarithms of their shares, ``float32``."""


def lessons_of(model: Any, layers: Layers, made: Sequence[Conversation]) -> list[Lesson]:
    """Ask the model that has the document."""
    lessons = []
    for start in range(0, len(made), BATCH):
        batch = made[start : start + BATCH]
        with torch.no_grad():
            logits = logits_behind(model, layers, [each.token_ids for each in batch])
        for conversation, row in zip(batch, logits, strict=True):
            count = len(conversation.token_ids) - 1
            logs = torch.log_softmax(row[:count], dim=-1)
            best = logs.topk(min(LIKELIEST, logs.shape[-1]), dim=-1)
            lessons.append(
                Lesson(
                    conversation.token_ids,
                    len(conversation.prompt_ids),
                    best.indices.to(torch.int32).cpu(),
                    best.values.cpu(),
                )
            )
    return lessons


def distance(logits: Any, lesson: Lesson) -> Any:
    """Kullback-Leibler divergence from what is expected, summed over a lesson's tokens; nats.

    Args:
        logits: ``[tokens or more, vocabulary]`` of the student.
        lesson: What is to be expected.
    """
    count = lesson.expected_logs.shape[0]
    theirs = lesson.expected_logs.to(logits.device)
    named = lesson.expected_ids.to(logits.device).long()
    mine = torch.log_softmax(logits[:count], dim=-1).gather(-1, named)
    near = (theirs.exp() * (theirs - mine)).sum()
    their_rest = (1 - theirs.exp().sum(dim=-1)).clamp(min=_LEAST)
    my_rest = (1 - mine.exp().sum(dim=-1)).clamp(min=_LEAST)
    return near + (their_rest * (their_rest.log() - my_rest.log())).sum()


def mean_distance(model: Any, layers: Layers | None, lessons: Sequence[Lesson]) -> float:
    """Of a token, over all lessons, without gradients."""
    total, count = 0.0, 0
    for start in range(0, len(lessons), BATCH):
        batch = lessons[start : start + BATCH]
        with torch.no_grad():
            logits = logits_behind(model, layers, [each.token_ids for each in batch])
            total += sum(
                float(distance(row, each)) for row, each in zip(logits, batch, strict=True)
            )
        count += sum(len(each.token_ids) - 1 for each in batch)
    return total / max(count, 1)


def answer_loss(model: Any, layers: Layers | None, asked: Sequence[Conversation]) -> float:
    """Mean negative logarithm of the share of each answer's tokens; nats per token."""
    total, count = 0.0, 0
    for start in range(0, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        with torch.no_grad():
            logits = logits_behind(model, layers, [each.token_ids for each in batch])
        for row, each in zip(logits, batch, strict=True):
            first, last = len(each.prompt_ids) - 1, len(each.token_ids) - 1
            logs = torch.log_softmax(row[first:last], dim=-1)
            wanted = torch.tensor(each.answer_ids, device=logs.device)[:, None]
            total -= float(logs.gather(-1, wanted).sum())
            count += len(each.answer_ids)
    return total / max(count, 1)
