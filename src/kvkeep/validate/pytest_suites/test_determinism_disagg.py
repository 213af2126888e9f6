"""Determinism where one engine prefills and another decodes."""

from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.kvbm, pytest.mark.e2e, pytest.mark.slow, pytest.mark.nightly]


def test_determinism_with_cache_reset(check_suite: Callable[[str], object]) -> None:
    """Answers stay the same across a reset of both engines."""
    check_suite("determinism-disaggregated")
