"""How a router spreads keys over engines."""

from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.e2e]


def test_keys_have_homes(check_suite: Callable[[str], object]) -> None:
    """A key has one home, homes are even, and only a leaver's keys move."""
    check_suite("routing")
