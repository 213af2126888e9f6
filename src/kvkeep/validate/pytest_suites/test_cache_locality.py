"""Named sequences' K/V at their owners."""

from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.e2e]


def test_sequences_are_kept(check_suite: Callable[[str], object]) -> None:
    """K/V is kept to the bit where its name says."""
    check_suite("locality")
