"""One cartridge out of several, one document after the other.

Each document was computed by itself and stays so: its tokens attend to their own document and to
none before it, as if every document were read for the first time. Questions behind them attend to
all. That is not what the model computes for the documents' text in one prompt, so what is composed
has no token ids: it is never taken in place of text, only put before a prompt.
"""

from collections.abc import Sequence

from kvkeep.authoring.built import Built
from kvkeep.authoring.rotation import Frequencies, config_of_model, frequencies_of, moved
from kvkeep.cartridges.contents import Contents
from kvkeep.cartridges.file_format import Cartridge
from kvkeep.cartridges.manifest import Manifest
from kvkeep.client.sequence_tensors import Tensor
from kvkeep.model.errors import InputError, RefusedError

PARTS_MAX = 64


def compose(cartridges: Sequence[Cartridge], model: str = "") -> Built:
    """Put cartridges one behind the other; keys of the later ones move to their new positions.

    Args:
        cartridges: Of one model, in the order in which their documents are to stand.
        model: Where the model's configuration is; empty: where the first manifest says.

    Raises:
        InputError: Too few or too many of them, or keys of such a model can't be moved.
        RefusedError: They don't go together; the sentence names every field.
    """
    if not 2 <= len(cartridges) <= PARTS_MAX:
        raise InputError(f"name 2 to {PARTS_MAX} cartridges to compose, not {len(cartridges)}")
    manifests = [cartridge.head.manifest for cartridge in cartridges]
    for manifest in manifests[1:]:
        _check_pair(manifests[0], manifest)
    config = config_of_model(model or manifests[0].model)
    frequencies = frequencies_of(config, manifests[0].head_dim)
    num_tokens = sum(manifest.num_tokens for manifest in manifests)
    tokens_max = config.get("max_position_embeddings") or num_tokens + 1
    if num_tokens >= tokens_max:
        raise InputError(
            f"together they have {num_tokens} tokens and the model takes {tokens_max} with the "
            "question: compose fewer"
        )
    contents = joined([cartridge.contents for cartridge in cartridges], frequencies)
    return Built(
        contents,
        manifests[0].identity if all(manifest.identity for manifest in manifests) else {},
        sum(manifest.num_training_steps for manifest in manifests),
    )


def joined(parts: Sequence[Contents], frequencies: Frequencies) -> Contents:
    """The KV of all parts; a part's keys are turned by as many positions as tokens precede it."""
    starts = [sum(part.num_tokens for part in parts[:idx]) for idx in range(len(parts))]
    layers = []
    for layer_idx in range(len(parts[0].layers)):
        keys, values = zip(*(part.layers[layer_idx] for part in parts), strict=True)
        turned = [
            moved(key, start, frequencies) if start else key
            for key, start in zip(keys, starts, strict=True)
        ]
        layers.append((_behind(turned), _behind(values)))
    return Contents(tuple(layers), num_frozen_tokens=parts[0].num_frozen_tokens)


def _behind(tensors: Sequence[Tensor]) -> Tensor:
    _, heads, dim = tensors[0].shape
    num_tokens = sum(tensor.shape[0] for tensor in tensors)
    # Rows of a tensor follow one another, so tokens behind tokens are bytes behind bytes.
    data = memoryview(b"".join(tensor.data for tensor in tensors))
    return Tensor(tensors[0].dtype, (num_tokens, heads, dim), data)


def _check_pair(first: Manifest, other: Manifest) -> None:
    found = []
    names = ["num_layers", "num_heads", "head_dim", "dtype", "block_tokens"]
    if not (first.identity and other.identity):
        names.insert(0, "model")
    for name in names:
        mine, theirs = getattr(first, name), getattr(other, name)
        if mine != theirs:
            found.append(f"{name} {mine} and {theirs}")
    if first.identity and other.identity:
        both = first.identity.keys() | other.identity.keys()
        found += [
            f"another {name}"
            for name in sorted(both)
            if first.identity.get(name) != other.identity.get(name)
        ]
    if found:
        raise RefusedError(
            f"cartridges {first.cartridge_id} and {other.cartridge_id} can't be composed: "
            f"{'; '.join(found)}: build both for one model and engine"
        )
