"""What one training is told; equal settings give equal cartridges, however often it is stopped."""

import hashlib
from typing import Annotated

import msgspec

CONVERSATIONS_MAX = 1 << 16


class TrainingSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a training, checked when they are made from a command's options."""

    num_tokens: Annotated[int, msgspec.Meta(ge=2, le=1 << 20)]
    """Tokens of the cartridge."""
    num_frozen_tokens: Annotated[int, msgspec.Meta(ge=0, le=1 << 10)] = 1
    """Leading tokens that stay as the document's prefill made them: models rest attention there."""
    num_steps: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)] = 200
    num_conversations: Annotated[int, msgspec.Meta(ge=8, le=CONVERSATIONS_MAX)] = 128
    """Conversations about the document that the model makes up; every eighth is held out."""
    num_per_step: Annotated[int, msgspec.Meta(ge=1, le=1 << 10)] = 4
    """Conversations of one step."""
    answer_tokens_max: Annotated[int, msgspec.Meta(ge=1, le=1 << 12)] = 48
    """Of a made-up answer."""
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.02
    """Of Adam, at its highest."""
    seed: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 0
    """Of everything that is drawn."""

    def digest(self, text: str, model: str) -> str:
        """What makes two trainings the same one."""
        whole = msgspec.json.encode([msgspec.to_builtins(self), text, model])
        return hashlib.sha256(whole).hexdigest()
