"""What is claimed of a request about which nothing can be said, and salts."""

from typing import Any

import pytest

from kvkeep.connector.cartridges.uses import SALT, claim_to_fail, salt_of
from tests.unit.connector.engines import make_request


@pytest.mark.parametrize(
    ("params", "claim"),
    [
        (None, 0),
        ({}, 0),
        ({"cartridge_id": "ships"}, 0),
        ({"cartridge_id": "ships", "cartridge_mode": "replace"}, 0),
        ({"cartridge_id": "ships", "cartridge_mode": "prepend"}, 16),
        ({"cartridge_id": "ships", "cartridge_tokens": 64}, 16),
    ],
)
def test_only_placeholders_are_kept_from_being_computed(params: Any, claim: int) -> None:
    """Text is computed, which is always right; what may be no text is claimed, and fails."""
    request = make_request()
    request.kv_transfer_params = params

    assert claim_to_fail(request, 16) == claim


def test_a_salt_is_made_once() -> None:
    """What a router has written is the same as what the engine would."""
    for own in (None, "own", f"{SALT}e"):
        whole = salt_of("d", own)
        assert salt_of("d", whole) == whole
    assert salt_of("d", f"{SALT}de") == f"{SALT}d:{SALT}de"
