"""The seam between a hand-off and the way its blocks go."""

from typing import Protocol


class Transport(Protocol):
    """Says what engines are told in ``kv_transfer_params``; bytes in, bytes out, no I/O.

    Threading and blocking: any thread, no waiting.
    """

    @property
    def name(self) -> str:
        """The word that chooses it in settings, and the label in metrics."""
        ...

    @property
    def is_reusable(self) -> bool:
        """Whether several decode engines may fetch one offer, one after the other."""
        ...

    @property
    def lease_s(self) -> float:
        """How long an offer lasts, in seconds; infinity if it is kept like anything else."""
        ...

    def prefill_params(self) -> bytes:
        """What a prefill engine is told, as JSON."""
        ...

    def is_empty(self, offer: bytes) -> bool:
        """Whether an offer says that the prompt has nothing that could be handed over.

        The decode engine then computes it, and nothing has failed.
        """
        ...

    def decode_params(self, offer: bytes) -> bytes | None:
        """What a decode engine is told, as JSON; None if this is no offer.

        Args:
            offer: ``kv_transfer_params`` of a prefill engine's answer, as it stands there.
        """
        ...

    def release_body(self, offer: bytes) -> bytes | None:
        """A completion request after which the prefill engine is free to use the blocks again.

        A decode engine gets it. None if nothing has to be done.
        """
        ...
