"""A tenant's name and secret, and what is derived of them."""

import pytest

from kvkeep.model.hashing import KEY_BYTES_MAX
from kvkeep.model.tenant import SECRET_BYTES, TAG_BYTES, TenantSecret, tag_of

SECRET = bytes(range(SECRET_BYTES))


def test_a_secret_never_shows_itself() -> None:
    """Neither its text nor its representation holds it, nor the key of its hashes."""
    secret = TenantSecret(SECRET)
    shown = f"{secret} {secret!r} {[secret]}"

    assert secret.fingerprint in shown
    for hidden in (SECRET, secret.chain_key):
        assert hidden.hex() not in shown
        assert repr(hidden)[2:-1] not in shown


def test_what_is_derived_of_a_secret_differs_by_purpose_and_never_changes() -> None:
    """The fingerprint is no part of the key, and engines of any version agree on both."""
    secret = TenantSecret(SECRET)

    assert secret.fingerprint == "aaf700c5a630e4f4e5de5b5614c213d0"
    assert (
        secret.chain_key.hex() == "46ee02bc6b407390b52fa49b6b1284e7283accf97a83ffdf35111283f4e60f1e"
    )
    assert secret.fingerprint not in secret.chain_key.hex()
    assert len(secret.chain_key) <= KEY_BYTES_MAX


def test_other_secrets_are_other_keys() -> None:
    """One bit of a secret changes all that is derived of it."""
    other = TenantSecret(SECRET[:-1] + b"\xff")

    assert other.chain_key != TenantSecret(SECRET).chain_key
    assert other.fingerprint != TenantSecret(SECRET).fingerprint


@pytest.mark.parametrize("num_bytes", [0, SECRET_BYTES - 1, SECRET_BYTES + 1])
def test_a_secret_has_one_length(num_bytes: int) -> None:
    """What is shorter could be guessed, and what is longer is a mistake."""
    with pytest.raises(ValueError, match=str(SECRET_BYTES)):
        TenantSecret(bytes(num_bytes))


def test_a_tag_is_of_its_name() -> None:
    """Equal names have equal tags on every host, and no tag is the canary's."""
    tags = {tag_of(name) for name in ("", "a", "b", "A", "ä", "a" * 1000)}

    assert len(tags) == 6
    assert {len(tag) for tag in tags} == {TAG_BYTES}
    assert bytes(TAG_BYTES) not in tags
