"""How much of a prompt a cartridge is, and what is said where it is not."""

from typing import Any

import numpy as np
import pytest

from kvkeep.cartridges.manifest import Manifest
from kvkeep.cartridges.store.claims import (
    SEAM_TOKENS,
    Asked,
    Claim,
    claim,
    find_asked,
    mode_of,
    tokens_to_insert,
)
from kvkeep.model.errors import InputError, RefusedError
from tests.unit.cartridges.made import small_manifest

BLOCK_TOKENS = 4
NUM_TOKENS = 18
IDS = np.arange(100, 100 + NUM_TOKENS, dtype=np.int32)


def manifest(num_tokens: int = NUM_TOKENS, *, has_token_ids: bool = True) -> Manifest:
    """Of a cartridge of one layer."""
    return small_manifest(num_tokens, BLOCK_TOKENS, has_token_ids=has_token_ids)


def claimed(prompt: list[int], **asked: Any) -> Claim:
    """What a cartridge with ids is of a prompt."""
    return claim(Asked("ships", **asked), manifest(), IDS, prompt, BLOCK_TOKENS)


@pytest.mark.parametrize(
    "params", [None, {}, {"cartridge_id": None}, {"kvkeep": {}}, "ships", {"cartridge_mode": "x"}]
)
def test_most_requests_name_none(params: Any) -> None:
    """Parameters without a cartridge, or without any shape, ask for nothing."""
    assert find_asked(params) is None


def test_a_request_names_one() -> None:
    """Fields of other connectors are passed over."""
    params = {"cartridge_id": "ships", "cartridge_mode": "prepend", "do_remote_prefill": True}

    assert find_asked(params) == Asked("ships", "prepend")


@pytest.mark.parametrize(
    "params",
    [
        {"cartridge_id": 7},
        {"cartridge_id": ""},
        {"cartridge_id": "../up"},
        {"cartridge_id": "ships", "cartridge_mode": "append"},
        {"cartridge_id": "ships", "cartridge_tokens": -1},
    ],
)
def test_a_wrong_name_is_refused(params: dict[str, Any]) -> None:
    """The sentence says which fields there are."""
    with pytest.raises(InputError, match="names a cartridge wrongly"):
        find_asked(params)


def test_a_prompt_that_begins_with_the_text() -> None:
    """All that both have in common is the cartridge's."""
    assert claimed([*IDS.tolist(), 1, 2, 3]) == Claim(NUM_TOKENS, is_strict=False)


@pytest.mark.parametrize("num_tokens", [1, 3, 17, 18])
def test_a_prompt_that_ends_inside_the_text(num_tokens: int) -> None:
    """The beginning of a cartridge is as good, and so is exactly the cartridge."""
    assert claimed(IDS[:num_tokens].tolist()).num_tokens == num_tokens


@pytest.mark.parametrize("num_merged", [1, SEAM_TOKENS])
def test_tokens_that_merge_at_the_seam_are_left_out(num_merged: int) -> None:
    """Only the exact common beginning is claimed."""
    num_exact = NUM_TOKENS - num_merged

    assert claimed([*IDS[:num_exact].tolist(), 7, 8, 9, 10]).num_tokens == num_exact


@pytest.mark.parametrize("num_exact", [0, 4, NUM_TOKENS - SEAM_TOKENS - 1])
def test_another_text_is_named(num_exact: int) -> None:
    """The first token that differs is in the sentence, with both ids."""
    with pytest.raises(RefusedError, match=f"token {num_exact} is 7 .* {100 + num_exact} in the"):
        claimed([*IDS[:num_exact].tolist(), *([7] * 40)])


def test_a_cartridge_without_ids_can_only_be_put_in_front() -> None:
    """A trained one has no text that a prompt could hold."""
    trained = manifest(16, has_token_ids=False)

    assert mode_of(Asked("ships"), trained) == "prepend"
    with pytest.raises(RefusedError, match="knows no token ids"):
        mode_of(Asked("ships", "replace"), trained)


def test_what_is_put_in_front() -> None:
    """Its own ids where there are any, and else as many placeholders, in whole blocks."""
    assert tokens_to_insert(manifest(), IDS.tolist(), BLOCK_TOKENS) == IDS.tolist()
    assert tokens_to_insert(manifest(16, has_token_ids=False), None, BLOCK_TOKENS) == [0] * 16
    with pytest.raises(RefusedError, match="don't fill blocks of 4"):
        tokens_to_insert(manifest(18, has_token_ids=False), None, BLOCK_TOKENS)


def test_a_cartridge_in_front_is_claimed_in_whole_blocks() -> None:
    """Its last tokens, with ids of their own, are computed as text on top of it."""
    prompt = [*IDS.tolist(), 1]

    found = claimed(prompt, mode="prepend", num_inserted=NUM_TOKENS)

    assert found == Claim(16, is_strict=True)


@pytest.mark.parametrize(
    ("prompt", "num_inserted", "why"),
    [
        ([1, 2, 3], 0, "was not put in front"),
        ([*IDS.tolist(), 1], 0, "was not put in front"),
        ([*IDS[:-1].tolist(), 7, 1], NUM_TOKENS, "was not put in front"),
        ([*IDS.tolist(), 1], 17, "was not put in front"),
        (IDS.tolist(), NUM_TOKENS, "the prompt is empty"),
    ],
)
def test_what_is_not_in_front_is_refused(
    prompt: list[int], num_inserted: int, why: str
) -> None:  # fmt: skip
    """Whoever says that it is there is not believed."""
    with pytest.raises(RefusedError, match=why):
        claimed(prompt, mode="prepend", num_inserted=num_inserted)
