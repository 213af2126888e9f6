"""Generation from end to end."""

from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.e2e]


def test_generation_from_end_to_end(check_suite: Callable[[str], object]) -> None:
    """Streams, whole answers, several at once, and clear errors."""
    check_suite("generation")
