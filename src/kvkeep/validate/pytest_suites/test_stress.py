"""Many requests at once."""

from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.nightly]


def test_all_are_answered(check_suite: Callable[[str], object]) -> None:
    """Under every load all requests are answered, and right."""
    check_suite("stress")
