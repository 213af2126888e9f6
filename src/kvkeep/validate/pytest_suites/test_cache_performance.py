"""What the cache gains."""

from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_loading_beats_computing(check_suite: Callable[[str], object]) -> None:
    """Loaded prompts answer sooner than computed ones, the more so the longer they are."""
    check_suite("cache-performance")
