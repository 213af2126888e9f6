"""What a request says of the cartridge it wants, and how much of its prompt that cartridge is.

A request names a cartridge in ``kv_transfer_params``:

    {"cartridge_id": "ships"}                                  the prompt begins with its text
    {"cartridge_id": "ships", "cartridge_mode": "prepend"}     the prompt does not hold its text

Nothing that a request says is believed: it only chooses what is compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from kvkeep.cartridges.manifest import CartridgeId, Manifest
from kvkeep.model.errors import InputError, RefusedError

FIELD = "cartridge_id"
MODE = "cartridge_mode"
INSERTED = "cartridge_tokens"
"""Tokens of the cartridge that were put in front of the prompt already."""
SEAM_TOKENS = 8
"""Where text goes on behind a cartridge's, its last tokens may merge with the first ones there."""
PLACEHOLDER_ID = 0
"""Stands for a token of a cartridge that knows no ids; never computed."""
Mode = Literal["replace", "prepend"]


class Asked(msgspec.Struct, frozen=True):
    """What a request says; other fields are other connectors'."""

    cartridge_id: CartridgeId
    mode: Mode | None = msgspec.field(name=MODE, default=None)
    """None: replace, unless the cartridge knows no ids."""
    num_inserted: Annotated[int, msgspec.Meta(ge=0, le=1 << 24)] = msgspec.field(
        name=INSERTED, default=0
    )


@dataclass(frozen=True, slots=True)
class Claim:
    """How much of a prompt a cartridge is."""

    num_tokens: int
    """Leading tokens of the prompt whose KV it has; whole blocks of them are loaded."""
    is_strict: bool
    """None of them may be computed: the prompt does not hold the cartridge's text."""


def find_asked(params: Any) -> Asked | None:
    """Which cartridge a request wants, if any.

    Args:
        params: Its ``kv_transfer_params``, anybody's.

    Raises:
        InputError: It names one wrongly.
    """
    if not isinstance(params, Mapping) or params.get(FIELD) is None:
        return None
    try:
        return msgspec.convert(dict(params), Asked)
    except msgspec.ValidationError as error:
        raise InputError(
            f"kv_transfer_params names a cartridge wrongly ({error}): give cartridge_id, and "
            "perhaps cartridge_mode, replace or prepend"
        ) from error


def mode_of(asked: Asked, manifest: Manifest) -> Mode:
    """How a cartridge is used for a request.

    Raises:
        RefusedError: It has no ids that could be compared with a prompt.
    """
    if asked.mode == "replace" and not manifest.has_token_ids:
        raise RefusedError(
            f"cartridge {manifest.cartridge_id} knows no token ids, so it can't replace text of a "
            "prompt: ask for it with cartridge_mode prepend"
        )
    return asked.mode or ("replace" if manifest.has_token_ids else "prepend")


def tokens_to_insert(
    manifest: Manifest, token_ids: Sequence[int] | None, block_tokens: int
) -> list[int]:
    """What stands in front of a prompt for a cartridge.

    Its own ids where it knows them: what is behind its last whole block is then computed as text.

    Raises:
        RefusedError: It knows no ids, and its last tokens don't fill a block.
    """
    if token_ids is not None:
        return list(token_ids)
    if manifest.num_tokens % block_tokens:
        raise RefusedError(
            f"cartridge {manifest.cartridge_id} has {manifest.num_tokens} tokens without ids, "
            f"which don't fill blocks of {block_tokens}: train it with a multiple of that"
        )
    return [PLACEHOLDER_ID] * manifest.num_tokens


def claim(
    asked: Asked,
    manifest: Manifest,
    token_ids: npt.NDArray[np.int32] | None,
    prompt: Sequence[int],
    block_tokens: int,
) -> Claim:
    """How much of a prompt a cartridge is.

    Args:
        asked: What the request says.
        manifest: Of the cartridge.
        token_ids: Of the cartridge; None where it has none.
        prompt: Token ids of the request.
        block_tokens: Tokens per block of the engine.

    Raises:
        RefusedError: One sentence that names where prompt and cartridge differ.
    """
    mode = mode_of(asked, manifest)
    if mode == "replace":
        assert token_ids is not None
        num_common = common_tokens(token_ids, prompt)
        _check_common(manifest, token_ids, prompt, num_common)
        return Claim(num_common, is_strict=False)
    ids = None if token_ids is None else token_ids.tolist()
    inserted = tokens_to_insert(manifest, ids, block_tokens)
    if asked.num_inserted != len(inserted) or list(prompt[: len(inserted)]) != inserted:
        raise RefusedError(
            f"cartridge {manifest.cartridge_id} was not put in front of the prompt: its "
            f"{len(inserted)} tokens are missing there"
        )
    if len(prompt) <= len(inserted):
        raise RefusedError(
            f"the prompt is empty behind cartridge {manifest.cartridge_id}: ask something"
        )
    return Claim(len(inserted) // block_tokens * block_tokens, is_strict=True)


def common_tokens(token_ids: npt.NDArray[np.int32], prompt: Sequence[int]) -> int:
    """Leading tokens that a cartridge and a prompt have in common."""
    num = min(len(token_ids), len(prompt))
    differ = np.flatnonzero(np.asarray(prompt[:num], dtype=np.int64) != token_ids[:num])
    return int(differ[0]) if differ.size else num


def _check_common(
    manifest: Manifest, token_ids: npt.NDArray[np.int32], prompt: Sequence[int], num_common: int
) -> None:
    """Refuse a prompt that does not begin with a cartridge, but for a merge at the seam.

    A prompt that ends inside the cartridge is its beginning, which is as good.
    """
    if num_common >= min(len(token_ids) - SEAM_TOKENS, len(prompt)) and num_common:
        return
    theirs = prompt[num_common] if num_common < len(prompt) else "nothing"
    raise RefusedError(
        f"the prompt does not begin with cartridge {manifest.cartridge_id}: token {num_common} is "
        f"{theirs} in the prompt and {token_ids[num_common]} in the cartridge: send its text from "
        "the first token on, with the same chat template, or ask for cartridge_mode prepend"
    )
