"""API keys: what the file must be, and what a request must show."""

import hashlib
from pathlib import Path

import pytest

from kvkeep.model.errors import InputError
from kvkeep.router.limits.keys import ApiKey, KeyRing

SECRET = "sk-0123456789abcdef"


def written(tmp_path: Path, text: str, mode: int = 0o600) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("shown", "name"),
    [
        (f"Bearer {SECRET}", "a"),
        (f"bearer  {SECRET} ", "a"),
        (f"Bearer {SECRET}x", None),
        (f"Bearer {SECRET[:-1]}", None),
        (f"Bearer {SECRET}{' ' * 2000}x", None),
        (f"Basic {SECRET}", None),
        (SECRET, None),
        ("Bearer ", None),
        ("", None),
    ],
)
def test_a_key_is_found_by_what_a_request_shows(shown: str, name: str | None) -> None:
    """Only the whole key as a bearer token is one."""
    found = KeyRing([ApiKey(name="a", key=SECRET)]).find(shown.encode())

    assert (found and found.name) == name


def test_the_longest_key_is_no_beginning_of_a_longer_one() -> None:
    """What is looked at has a limit, and what is beyond it counts all the same."""
    ring = KeyRing([ApiKey(name="a", key="k" * 1024)])

    assert ring.find(b"Bearer " + b"k" * 1024) is not None
    assert ring.find(b"Bearer " + b"k" * 1025) is None


def test_a_request_without_the_header_has_no_key() -> None:
    """Nothing shown is no key."""
    assert KeyRing([ApiKey(name="a", key=SECRET)]).find(None) is None


def test_a_file_may_hold_digests_only(tmp_path: Path) -> None:
    """Who reads the file learns no key."""
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    ring = KeyRing.load(written(tmp_path, f"- {{name: b, key_sha256: {digest}, burst: 3}}"))
    found = ring.find(f"Bearer {SECRET}".encode())

    assert found is not None
    assert (found.name, found.burst) == ("b", 3)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602, 0o700])
def test_a_file_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    """The sentence says what to run."""
    path = written(tmp_path, f"- {{name: a, key: {SECRET}}}", mode)

    with pytest.raises(InputError, match="chmod 600"):
        KeyRing.load(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "name: a",
        f"- {{name: a, key: {SECRET}, more: 1}}",
        f"- {{name: a, key: {SECRET}, key_sha256: {'0' * 64}}}",
        "- {name: a}",
        "- {name: a, key: short}",
        f"- {{name: a, key: {'k' * 1025}}}",
        f'- {{name: a, key: "{SECRET}\\n"}}',
        f"- {{name: a, key: {SECRET}}}\n- {{name: a, key: {SECRET}b}}",
        f"- {{name: a, key: {SECRET}}}\n- {{name: b, key: {SECRET}}}",
        f"- {{name: 'a b', key: {SECRET}}}",
        f"- {{name: a, key: {SECRET}, requests_per_s: -1}}",
        "- [" * 2000,
    ],
)
def test_a_wrong_file_is_refused_without_telling_its_keys(tmp_path: Path, text: str) -> None:
    """The complaint goes to logs, and a key must not."""
    with pytest.raises(InputError) as caught:
        KeyRing.load(written(tmp_path, text))

    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A folder, or nothing at all."""
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError):
            KeyRing.load(path)


def test_a_key_shows_in_no_representation() -> None:
    """What ends up in a log names the key and does not tell it."""
    assert SECRET not in repr(ApiKey(name="a", key=SECRET))
