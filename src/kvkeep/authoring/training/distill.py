"""The training: a short prefix moves until the model expects what the document makes it expect.

Keys and values are trained, the weights stay as they are. The prefix begins as the first tokens of
the document's own KV.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

import torch

from kvkeep.authoring.training.forward import Layers, logits_behind
from kvkeep.authoring.training.settings import TrainingSettings
from kvkeep.authoring.training.teacher import Lesson, distance
from kvkeep.model.errors import CorruptDataError, InvariantError

WARM_SHARE = 0.05
"""Of all steps, over which the learning rate rises to its highest."""
LAST_SHARE = 0.05
"""Of the highest learning rate, at the end."""


class Student:
    """A prefix under training."""

    def __init__(self, document: Layers, settings: TrainingSettings) -> None:
        """Begin as the first tokens of a document's KV.

        Args:
            document: Its KV, at least as long as the prefix.
            settings: Of the training.
        """
        frozen, all_tokens = settings.num_frozen_tokens, settings.num_tokens
        if not frozen < all_tokens <= document[0][0].shape[2]:
            raise InvariantError(f"a prefix of {all_tokens} tokens, {frozen} of them frozen")
        self._settings = settings
        self._frozen = [tuple(each[:, :, :frozen].float() for each in pair) for pair in document]
        self._moving = [
            tuple(
                each[:, :, frozen:all_tokens].float().clone().requires_grad_(True) for each in pair
            )
            for pair in document
        ]
        self._optimizer = torch.optim.Adam(
            [each for pair in self._moving for each in pair], lr=settings.learning_rate
        )
        self.steps_done = 0

    def layers(self) -> list[tuple[Any, Any]]:
        """Keys and values of all its tokens, float32; gradients reach what is trained."""
        return [
            (torch.cat((still[0], moving[0]), dim=2), torch.cat((still[1], moving[1]), dim=2))
            for still, moving in zip(self._frozen, self._moving, strict=True)
        ]

    def learn(self, model: Any, lessons: Sequence[Lesson]) -> float:
        """One step over these lessons; their mean distance before it, nats per token."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._settings, self.steps_done)
        self._optimizer.zero_grad(set_to_none=True)
        logits = logits_behind(model, self.layers(), [each.token_ids for each in lessons])
        count = sum(len(each.token_ids) - 1 for each in lessons)
        loss = sum(distance(row, each) for row, each in zip(logits, lessons, strict=True)) / count
        loss.backward()
        self._optimizer.step()
        self.steps_done += 1
        return float(loss.detach())

    # ---- Going on

    def state(self) -> dict[str, Any]:
        """All that a student needs to go on from here; copies on the CPU."""
        return {
            "steps_done": self.steps_done,
            "moving": [each.detach().cpu().clone() for pair in self._moving for each in pair],
            "optimizer": self._optimizer.state_dict(),
        }

    def go_on(self, state: dict[str, Any]) -> None:
        """Become what `state` was asked of.

        Raises:
            CorruptDataError: It is of another student.
        """
        mine = [each for pair in self._moving for each in pair]
        try:
            with torch.no_grad():
                for into, source in zip(mine, state["moving"], strict=True):
                    into.copy_(source.reshape(into.shape))
            self._optimizer.load_state_dict(state["optimizer"])
            self.steps_done = int(state["steps_done"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CorruptDataError(
                "the kept state is not of this training: remove its --work folder and train anew"
            ) from error


def learning_rate(settings: TrainingSettings, step_idx: int) -> float:
    """Rises at first, then falls along a cosine."""
    warm = max(round(settings.num_steps * WARM_SHARE), 1)
    if step_idx < warm:
        return settings.learning_rate * (step_idx + 1) / warm
    share = (step_idx - warm) / max(settings.num_steps - warm, 1)
    falling = LAST_SHARE + (1 - LAST_SHARE) * (1 + math.cos(math.pi * share)) / 2
    return settings.learning_rate * falling


def lessons_of_step(
    lessons: Sequence[Lesson], settings: TrainingSettings, step_idx: int
) -> list[Lesson]:
    """Those of one step: every lesson once, in an order drawn anew each time round."""
    first = step_idx * settings.num_per_step
    chosen = []
    for place in range(first, first + settings.num_per_step):
        turn, idx = divmod(place, len(lessons))
        order = list(range(len(lessons)))
        random.Random(f"{settings.seed} {turn}").shuffle(order)
        chosen.append(lessons[order[idx]])
    return chosen
