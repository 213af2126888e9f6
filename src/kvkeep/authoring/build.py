"""A cartridge out of a text, by a prefill."""

from kvkeep.authoring.built import Built
from kvkeep.authoring.models import load_author
from kvkeep.authoring.prefill import prefill
from kvkeep.authoring.texts import Role, document_ids


def build(
    text: str, model: str, *, role: Role = "none", device: str = "auto", dtype: str = "auto"
) -> Built:
    """Compute a text's KV.

    Args:
        text: The document.
        model: ``smollm2``, a folder, or a Hugging Face id.
        role: Whose message of a chat the text begins.
        device: ``cpu``, ``cuda`` or ``auto``.
        dtype: Of the KV, and of what computes it; ``auto``: the model's own.

    Raises:
        InputError: The text or the model can't be used.
        UnavailableError: The model could not be converted or loaded.
        CapacityError: There is not enough memory.
    """
    author = load_author(model, device=device, dtype=dtype)
    token_ids = document_ids(author.tokenizer, text, role, author.tokens_max)
    return Built(prefill(author, token_ids), author.identity)
