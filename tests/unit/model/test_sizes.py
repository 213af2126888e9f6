"""Sizes as people write them."""

import pytest

from kvkeep.model.errors import InputError
from kvkeep.model.sizes import parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0),
        ("1073741824", 1 << 30),
        ("2GiB", 2 << 30),
        (" 512 MiB ", 512 << 20),
        ("1.5kib", 1536),
        ("3 kB", 3000),
        ("4TB", 4 * 10**12),
        ("1tib", 1 << 40),
        ("7b", 7),
        (12345, 12345),
    ],
)
def test_sizes_are_understood(text: object, num_bytes: int) -> None:
    """With units of either kind, or none."""
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 XB", "1e9", "1.5.2", "0x10", True, None, 1.5])
def test_what_is_no_size_is_said(text: object) -> None:
    """The sentence shows what was written and how to write it."""
    with pytest.raises(InputError, match="is not a size"):
        parse_bytes(text)


def test_large_sizes_are_exact() -> None:
    """A number without a unit is not rounded on its way."""
    assert parse_bytes("9007199254740993") == 9007199254740993
