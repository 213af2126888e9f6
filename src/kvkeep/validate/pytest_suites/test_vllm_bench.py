"""Throughput beside an engine without a cache."""

from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.nightly]


def test_throughput_is_kept(check_suite: Callable[[str], object]) -> None:
    """Storing costs next to no throughput."""
    check_suite("bench")
