"""What a training found out, in numbers: losses on its way and at its end."""

import msgspec


class Step(msgspec.Struct, frozen=True):
    """One step; every loss in nats per token."""

    step: int
    """How many were done before it."""
    trained_on: float
    """Distance to what the whole document makes the model expect, before the step."""
    held_out: float | None = None
    """The same over conversations that are never trained on; None: not looked at here."""


class Losses(msgspec.Struct, frozen=True):
    """One measure by what stands before the question, in nats per token."""

    nothing: float
    beginning: float
    """As many of the document's first tokens as the cartridge has."""
    cartridge: float
    text: float
    """The whole document."""

    @property
    def way(self) -> float:
        """Share of the way from nothing to the whole text that the cartridge goes; 1: all of it."""
        return (self.nothing - self.cartridge) / (self.nothing - self.text or 1e-9)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Of one finished training."""

    num_tokens: int
    """Of the cartridge."""
    num_document_tokens: int
    num_steps: int
    steps: list[Step]
    conversations: Losses
    """Loss of the held-out answers that the model made up."""
    questions: Losses | None
    """Loss of the right answers to a person's questions, where some were given."""

    @property
    def ratio(self) -> float:
        """How many times fewer tokens than the document it has."""
        return self.num_document_tokens / self.num_tokens
